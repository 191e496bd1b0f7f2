"""Compute the rotary angles of a config with transformers, up to the end of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynexport.exporter.reference import own_models
from dynexport.exporter.reference.hugging_face import FloatArray
from dynexport.exporter.reference.loading import FOREIGN_FIELDS
from dynexport.runtime.bundle.errors import DynexportError, require_module


def rotary_angles(
    config: Mapping[str, Any], positions: Sequence[int], layer_type: str = ""
) -> tuple[FloatArray, FloatArray] | None:
    """Return cos and sin of some positions, computed by the rotary module of transformers' model.

    Args:
        config: the fields of config.json.
        positions: ascending; the last one ends the text, where frequencies depend on the length.
        layer_type: the layers in question, where layers of several types have angles of their own.

    Returns:
        float32 [positions, rotary dim / 2] each; None for a model without such a module.

    Raises:
        DynexportError: when torch or transformers is missing, or transformers cannot build the model.
    """
    require_module("torch", "torch", "compute rotary angles")
    require_module("transformers", "torch", "compute rotary angles")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own_models.register(str(config.get("model_type")))
    fields = {name: value for name, value in config.items() if name not in FOREIGN_FIELDS}
    try:
        known = AutoConfig.for_model(config.get("model_type"), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except Exception as error:  # transformers raises anything here
        reason = " ".join(str(error).split())
        raise DynexportError(f"transformers cannot build {config.get('model_type')!r}: {reason:.300}") from error
    of_type = {"layer_type": layer_type} if layer_type else {}
    for name in (f"{layer_type}_inv_freq" if layer_type else "inv_freq", "embed_positions"):
        kinds = {type(module) for module in model.modules() if hasattr(module, name)}
        if len(kinds) == 1:
            known_module = kinds.pop()(config=known)
            with torch.no_grad():
                found = known_module(torch.zeros(1, 1, 1), torch.tensor([list(positions)]), **of_type)
            if not name.endswith("inv_freq"):  # gptj and codegen return sin and cos, of one channel of a pair
                cos, sin = reversed(found)
            else:
                cos, sin = (_of_pairs(part, getattr(known_module, name).shape[-1]) for part in found)
            return np.asarray(cos[0], np.float32), np.asarray(sin[0], np.float32)
    return None


def _of_pairs(angles: Any, pairs: int) -> Any:
    """Return one of the two channels that rotate together: halves of a head, or neighbours; some have just one."""
    if angles.shape[-1] == pairs:
        return angles
    first, second = angles[..., ::2], angles[..., 1::2]
    return first if first.equal(second) else angles[..., : angles.shape[-1] // 2]


__all__ = ["rotary_angles"]
