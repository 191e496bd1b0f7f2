"""FlexiDepth (arXiv 2503.23798): model_type ddllama, and ddqwen3 of the port to Qwen3."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.strategies.mod.importers.imported import (
    ImportedCheckpoint,
    Origin,
    Origins,
    under_contract,
)
from dynexport.exporter.strategies.mod.importers.own_fields import OwnFields

_TITLE = "FlexiDepth"
_FAMILIES = {"ddllama": "llama", "ddqwen3": "qwen3"}
_ROUTERS = r"model\.layers\.\d+\.router(_proj)?\..+"
# The port's field: with "ste_hard", MLP and adapter have no factors w and 1 - w.
_GATES = {"released": "split", "ste_hard": "none"}
_FACTS: dict[str, Any] = {
    "strategy": "mod",
    "target": "block",
    "skipped_kv": "own",
    "router_input": "normed",
    "router": {"kind": "bottleneck"},
    "skip_branch": "adapter",
    "decision": {"rule": "router", "threshold": 0.5, "comparison": ">"},
}


def _recognises(stored: Checkpoint) -> bool:
    return stored.config.get("model_type") in _FAMILIES


def _read(stored: Checkpoint) -> ImportedCheckpoint:
    fields = OwnFields(stored)
    family = _FAMILIES[fields.one_of("model_type", *_FAMILIES)]
    layers = fields.listed_layers("routing_layers", r"model\.layers\.(\d{1,4})\.router\.router_enc\.weight")
    gate = _GATES[fields.one_of("router_gate_mode", *_GATES, default="released")]
    if fields.config.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "silu, which the contract's adapters compute", fields.config["hidden_act"])
    hidden = fields.size("hidden_size")
    narrow = hidden // fields.integer("router_reduction_factor", 16)
    adapter = fields.size("intermediate_size") // fields.integer("proj_reduction_factor", 16)
    origins: Origins = {}
    for layer in layers:
        origins |= _router(f"model.layers.{layer}.", hidden, narrow)
        origins |= _adapter(f"model.layers.{layer}.", hidden, adapter)
    facts = _FACTS | {"routed_layers": layers, "gate": gate}
    return under_contract(stored, _TITLE, _ROUTERS, origins, facts, fields.config | {"model_type": family})


def _router(layer: str, hidden: int, narrow: int) -> Origins:
    """Return the origins of a router; its last two products have nothing between them and become one row."""
    theirs, ours = f"{layer}router.router_", f"{layer}mod_router."
    head = (f"{theirs}head.weight", f"{theirs}dec.weight")
    return {
        f"{ours}fc1.weight": Origin((f"{theirs}enc.weight",), ((narrow, hidden),)),
        f"{ours}norm.weight": Origin((f"{theirs}norm.weight",), ((narrow,),)),
        f"{ours}fc2.weight": Origin(head, ((1, hidden), (hidden, narrow)), _product, (1, narrow)),
    }


def _adapter(layer: str, hidden: int, inner: int) -> Origins:
    """Return the origins of an adapter; its names of the products into and out of it are exchanged."""
    parts = {"gate": ("gate", (inner, hidden)), "up": ("down", (inner, hidden)), "down": ("up", (hidden, inner))}
    return {
        f"{layer}mod_adapter.{ours}_proj.weight": Origin((f"{layer}router_proj.{theirs}_proj.weight",), (shape,))
        for ours, (theirs, shape) in parts.items()
    }


def _product(parts: list[np.ndarray]) -> np.ndarray:
    first, second = (part.astype(np.float64) for part in parts)
    return np.asarray(first @ second)


FLEXIDEPTH = Importer("flexidepth", _read, _recognises)

__all__ = ["FLEXIDEPTH"]
