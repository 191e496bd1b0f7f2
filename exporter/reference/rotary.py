"""Rotary angles as transformers computes them: what a family's config means, to the end of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynexport.exporter.reference.hugging_face import FloatArray
from dynexport.runtime.bundle.errors import DynexportError, require_module

# About the bytes on disk or the routing, not about positions.
_FOREIGN_FIELDS = ("model_type", "dynexport", "dtype", "torch_dtype", "quantization_config")


def rotary_angles(config: Mapping[str, Any], positions: Sequence[int]) -> tuple[FloatArray, FloatArray] | None:
    """Cos and sin of some positions, by the module that transformers' model of this config has for them.

    Args:
        config: the fields of config.json.
        positions: ascending; where frequencies follow from the length of a text, of one that ends with the last.

    Returns:
        float32 [positions, rotary dim / 2] each; None for a model without such a module.

    Raises:
        DynexportError: when torch or transformers is missing, or transformers cannot build the model.
    """
    require_module("torch", "torch", "compute rotary angles")
    require_module("transformers", "torch", "compute rotary angles")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in _FOREIGN_FIELDS}
    try:
        known = AutoConfig.for_model(config.get("model_type"), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except Exception as error:  # transformers raises anything here
        reason = " ".join(str(error).split())
        raise DynexportError(f"transformers cannot build {config.get('model_type')!r}: {reason:.300}") from error
    kinds = {type(module) for module in model.modules() if hasattr(module, "inv_freq")}
    if len(kinds) != 1:
        return None
    module = kinds.pop()(config=known)
    with torch.no_grad():
        cos, sin = module(torch.zeros(1, 1, 1), torch.tensor([list(positions)]))
    half = cos.shape[-1] // 2  # both halves of a head's channels turn by the same angles
    return np.asarray(cos[0, :, :half], np.float32), np.asarray(sin[0, :, :half], np.float32)


__all__ = ["rotary_angles"]
