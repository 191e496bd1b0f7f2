"""SkipGPT (arXiv 2506.04179): a router for attention and one for the MLP in every layer, beside the base model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.strategies.mod.importers.imported import (
    ImportedCheckpoint,
    Origin,
    Origins,
    renamed,
    under_contract,
)
from dynexport.exporter.strategies.mod.importers.own_fields import OwnFields

_TITLE = "SkipGPT"
# The stage with LoRA saves names with peft's prefix; a wrapped model has the rest of a layer under "block".
_PREFIX, _WRAPPED = re.compile(r"^base_model\.model\."), re.compile(r"^(model\.layers\.\d{1,4}\.)block\.")
_ROUTERS = r"model\.layers\.\d+\.router_(attention|mlp)\..+"
_PARTS = {"attention": "mod_router", "mlp": "mod_mlp_router"}
_FACTS: dict[str, Any] = {
    "strategy": "mod",
    "target": "attention+mlp",
    "skipped_kv": "own",
    "router_input": "hidden",
    "gate": "none",
    "decision": {"rule": "router", "threshold": 0.5, "comparison": ">="},
}
_NOISE = (
    "decisions: the larger of a router's two scores, a tie runs; the authors' evaluation adds random noise to the "
    "scores, so that its results differ from run to run"
)


def _plain(name: str) -> str:
    return _WRAPPED.sub(r"\1", _PREFIX.sub("", name))


def _recognises(stored: Checkpoint) -> bool:
    return any(re.fullmatch(_ROUTERS, _plain(name)) for name in stored.names)


def _read(stored: Checkpoint) -> ImportedCheckpoint:
    stored = renamed(stored, _plain)
    fields = OwnFields(stored)
    hidden, layers = fields.size("hidden_size"), list(range(fields.layers))
    two_layers = any(re.fullmatch(_ROUTERS, name) and ".hidden_layer." in name for name in stored.names)
    origins: Origins = {}
    for layer in layers:
        for part, ours in _PARTS.items():
            theirs = f"model.layers.{layer}.router_{part}."
            make = _two_layers if two_layers else _linear
            origins |= make(theirs, f"model.layers.{layer}.{ours}.", hidden)
    router = {"kind": "mlp", "activation": "relu"} if two_layers else {"kind": "pair"}
    facts = _FACTS | {"routed_layers": layers, "router": router}
    return under_contract(stored, _TITLE, _ROUTERS, origins, facts, fields.config, [_NOISE])


def _linear(theirs: str, ours: str, hidden: int) -> Origins:
    """Return the origins of a router as published: two rows, of which the first runs."""
    return {
        f"{ours}weight": Origin((f"{theirs}weight_predictor.weight",), ((2, hidden),)),
        f"{ours}bias": Origin((f"{theirs}weight_predictor.bias",), ((2,),)),
    }


def _two_layers(theirs: str, ours: str, hidden: int) -> Origins:
    """Return the origins of a router as the code has it: a hidden layer of a quarter, then two rows."""
    width = hidden // 4
    return {
        f"{ours}fc1.weight": Origin((f"{theirs}hidden_layer.weight",), ((width, hidden),)),
        f"{ours}fc1.bias": Origin((f"{theirs}hidden_layer.bias",), ((width,),)),
        f"{ours}fc2.weight": Origin((f"{theirs}weight_predictor.weight",), ((2, width),), _difference, (1, width)),
        f"{ours}fc2.bias": Origin((f"{theirs}weight_predictor.bias",), ((2,),), _difference, (1,)),
    }


def _difference(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0][:1] - parts[0][1:]


SKIPGPT = Importer("skipgpt", _read, _recognises)

__all__ = ["SKIPGPT"]
