"""Read the author's sampling options from a model's generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.generation.sampling import Sampling

GENERATION_CONFIG = "generation_config.json"
_TOP_K = 50  # transformers' default with do_sample
# Fields that are copied unchanged, for greedy choice as well.
_TAKEN = (
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "bad_words_ids",
)
# Fields that change the generated tokens and that dynexport does not support, with their neutral values.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "assistant_early_exit": (),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "top_h": (1,),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Recommended:
    """The author's recommended sampling.

    Attributes:
        sampling: greedy unless the file sets ``do_sample``; other fields come from the file in both cases.
        stop: strings that end an answer.
        left_out: fields that change the generated tokens and that dynexport does not support, with their values.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def recommended_by(bundle: Bundle) -> Recommended:
    """Read the recommended sampling of a bundle's model; greedy without a generation_config.json.

    Raises:
        DynexportError: for a generation_config.json that cannot be used; the message names the field.
    """
    if GENERATION_CONFIG not in bundle.manifest.files:
        return Recommended()
    return read_generation_config(bundle.read(GENERATION_CONFIG))


def read_generation_config(content: bytes) -> Recommended:
    """Read a generation_config.json; absent fields get transformers' defaults.

    Raises:
        DynexportError: when it is not a JSON object, or a field that is used is out of its range.
    """
    stored = parse_json_object(content, GENERATION_CONFIG)
    fields = {name: value for name, value in stored.items() if value is not None}
    samples = fields.get("do_sample", False)
    if not isinstance(samples, bool):
        raise DynexportError(f"{GENERATION_CONFIG}: do_sample: expected true or false, found {samples!r:.80}")
    top_k = fields.get("top_k", _TOP_K if samples else 0)
    try:
        sampling = Sampling(
            temperature=fields.get("temperature", 1.0) if samples else 0.0,
            top_k=0 if top_k == -1 else top_k,  # vLLM's way to say "all"
            **{name: fields[name] for name in _TAKEN if name in fields},
        )
    except DynexportError as error:
        raise DynexportError(f"{GENERATION_CONFIG}: {error}") from error
    return Recommended(sampling, _stop_strings(fields), _left_out(fields))


def _stop_strings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop_strings", [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise DynexportError(f"{GENERATION_CONFIG}: stop_strings: expected text or several, found {value!r:.80}")
    return tuple(texts)


def _left_out(fields: Mapping[str, Any]) -> tuple[str, ...]:
    found = [(name, fields[name]) for name in sorted(_NEUTRAL) if name in fields]
    return tuple(f"{name} {json.dumps(value)!s:.40}" for name, value in found if value not in _NEUTRAL[name])


__all__ = ["GENERATION_CONFIG", "Recommended", "read_generation_config", "recommended_by"]
