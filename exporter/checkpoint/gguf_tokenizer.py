"""The tokenizer that a GGUF file carries, as the tokenizer.json and tokenizer_config.json of Hugging Face."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Normalizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from dynexport.exporter.checkpoint.gguf_config import Metadata
from dynexport.runtime.errors import DynexportError

_CONTROL, _USER_DEFINED = 3, 4
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Splitting:
    """What ``tokenizer.ggml.pre`` stands for.

    Attributes:
        digits: that stay together: "" for one, "{1,3}" for up to three; None for GPT-2's own pattern.
        single_digits: whether digits are set apart before GPT-2's pattern.
        whole_words: whether a word of the vocabulary is taken without merging.
        begins: whether a text begins with bos where the file does not say.
        composes: whether text is brought into Unicode's composed form.
    """

    digits: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    begins: bool = False
    composes: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """Splits text into words and writes their bytes in the alphabet of the vocabulary."""
        if self.digits is not None:
            split = Split(Regex(_PATTERN % self.digits), behavior="isolated", invert=False)
            return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        words = ByteLevel(add_prefix_space=False, use_regex=True)
        return Sequence([Digits(individual_digits=True), words]) if self.single_digits else words

    def normalizer(self) -> Normalizer | None:
        """What is done to text before it is split."""
        return NFC() if self.composes else None


_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "default": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "llama-bpe": _Splitting(digits="{1,3}", whole_words=True, begins=True),
    "smaug-bpe": _Splitting(digits="{1,3}"),
    "qwen2": _Splitting(digits="", composes=True),
}


def tokenizer_files(metadata: Metadata, *, build: bool) -> dict[str, bytes]:
    """The files of a tokenizer, name -> content.

    Args:
        metadata: of the GGUF file.
        build: whether to make ``tokenizer.json``. It is left out for an unsupported kind of tokenizer; the
            user then names one.

    Raises:
        DynexportError: when the vocabulary is damaged.
    """
    tokens = metadata.optional("tokenizer.ggml.tokens", list, "a list of strings") or []
    ids = {name: metadata.token(name) for name in ("bos", "eos", "eot", "padding", "unknown")}
    for name, token in ids.items():
        if token is not None and tokens and not 0 <= token < len(tokens):
            raise metadata.error(f"tokenizer.ggml.{name}_token_id", f"an id below {len(tokens)}")
    files = {
        "generation_config.json": _json(_generation(ids)),
        "tokenizer_config.json": _json(_settings(metadata, ids, tokens)),
    }
    template = metadata.optional("tokenizer.chat_template", str, "a string")
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    splitting = _splitting(metadata)
    if build and splitting is not None and tokens:
        files["tokenizer.json"] = _build(metadata, splitting, tokens).to_str().encode()
    return files


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _generation(ids: dict[str, int | None]) -> dict[str, Any]:
    ends = list(dict.fromkeys(token for token in (ids["eos"], ids["eot"]) if token is not None))
    fields = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
    return {name: value for name, value in fields.items() if value is not None}


def _settings(metadata: Metadata, ids: dict[str, int | None], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(metadata, "bos"),
        "add_eos_token": _adds(metadata, "eos"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = ids[key]
        if token is not None and tokens:
            settings[f"{name}_token"] = tokens[token]
    return settings


def _splitting(metadata: Metadata) -> _Splitting | None:
    """How words are split, or None for a tokenizer that is not byte-level BPE of a known kind."""
    if metadata.optional("tokenizer.ggml.model", str, "a string") != "gpt2":
        return None
    return _SPLITTINGS.get(metadata.optional("tokenizer.ggml.pre", str, "a string") or "")


def _adds(metadata: Metadata, name: str) -> bool:
    """Whether a text gets bos in front, or eos at its end."""
    told = metadata.optional(f"tokenizer.ggml.add_{name}_token", bool, "true or false")
    if told is not None or name == "eos":
        return bool(told)
    splitting = _splitting(metadata)
    is_sentencepiece = metadata.optional("tokenizer.ggml.model", str, "a string") == "llama"
    return is_sentencepiece or (splitting is not None and splitting.begins)


def _build(metadata: Metadata, splitting: _Splitting, tokens: list[str]) -> Tokenizer:
    merges = metadata.optional("tokenizer.ggml.merges", list, "a list of strings") or []
    kinds = metadata.optional("tokenizer.ggml.token_type", list, "a list of integers") or [1] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise metadata.error("tokenizer.ggml.tokens", f"{len(kinds)} different tokens, one a token_type")
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        model = BPE(vocabulary, pairs, ignore_merges=splitting.whole_words)
    except Exception as error:  # the library raises bare Exception for merges outside the vocabulary
        raise DynexportError(
            f"{metadata.header.path}: metadata tokenizer.ggml.merges: expected pairs of tokens, "
            f"found others ({str(error)!r:.200}); name a tokenizer.json"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = splitting.normalizer()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = _frame(metadata, tokens)
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [token for token, token_kind in zip(tokens, kinds, strict=True) if token_kind == kind]
        added = [AddedToken(token, special=is_special, normalized=False) for token in chosen]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    return tokenizer


def _frame(metadata: Metadata, tokens: list[str]) -> TemplateProcessing:
    """Puts bos before a text and eos behind it, where the model wants them."""
    first, last = (
        [tokens[token]] if _adds(metadata, name) and (token := metadata.token(name)) is not None else []
        for name in ("bos", "eos")
    )
    known = [(token, tokens.index(token)) for token in dict.fromkeys(first + last)]
    single = [*first, "$A", *last]
    return TemplateProcessing(
        single=single, pair=[*single, *(f"{part}:1" for part in (*first, "$B", *last))], special_tokens=known
    )
