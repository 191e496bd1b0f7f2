"""The sampling settings that a GGUF file recommends, as fields of a generation_config.json."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.checkpoint.gguf_metadata import Metadata

_PREFIX = "general.sampling."
_FIELDS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_SAMPLES = ("temperature", "top_k", "top_p", "min_p")
# Values that switch a method off, and the keys of details that have no effect without their method.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "xtc_probability": (0,),
    "penalty_last_n": (-1,),
}
_DETAILS = ("mirostat_tau", "mirostat_eta", "xtc_threshold")


def read_sampling(metadata: Metadata) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the sampling fields of generation_config.json, and a note on the keys that are left out.

    Raises:
        DynexportError: when a value is not a finite number >= 0.
    """
    fields = {field: value for key, field in _FIELDS.items() if (value := metadata.finite(_PREFIX + key)) is not None}
    if fields.get("temperature") == 0:
        fields["do_sample"] = False
        del fields["temperature"]
    elif any(field in fields for field in _SAMPLES):
        fields["do_sample"] = True
    given = {
        key.removeprefix(_PREFIX): value for key, value in metadata.header.metadata.items() if key.startswith(_PREFIX)
    }
    others = [
        f"{key} {value!r:.40}"
        for key, value in sorted(given.items())
        if key not in _FIELDS and key not in _DETAILS and value not in _NEUTRAL.get(key, ())
    ]
    if not others:
        return fields, ()
    return fields, (f"{_PREFIX}*: ignored {', '.join(others):.300}; dynexport does not support these",)
