"""MindSkip of Router-Tuning (arXiv 2410.13184): a sequence's attention runs in a layer or does not."""

from __future__ import annotations

import re
from typing import Any

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.strategies.mod.importers.imported import (
    ImportedCheckpoint,
    Origin,
    under_contract,
)
from dynexport.exporter.strategies.mod.importers.own_fields import OwnFields

_TITLE = "MindSkip"
_FAMILIES = ("llama", "mistral", "qwen2")
_ENDING = "_mindskip"
_SWITCHES = ("is_mindskip", "is_mod")
_ROUTERS = r"model\.layers\.\d+\.router\..+"
_FACTS: dict[str, Any] = {
    "strategy": "mod",
    "target": "attention",
    "skipped_kv": "none",
    "level": "sequence",
    "router_input": "normed",
    "router": {"kind": "linear"},
    "gate": "none",
}
_TRAINING = (
    "gradient_scale",
    "gate_init_method",
    "mindskip_capacity",
    "mindskip_loss_coefficient",
    "mindskip_loss_type",
    "mod_capacity",
    "router_layers",
)
_DIFFERENCES = (
    "decisions: by each row's own prompt, without padding, and kept for all that follows; the authors' code averages "
    "over padding too, and decides anew at every later prompt of a conversation"
)


def _recognises(stored: Checkpoint) -> bool:
    model_type, config = stored.config.get("model_type"), stored.config
    if isinstance(model_type, str) and model_type.endswith(_ENDING):
        return True
    return any(name in config for name in _SWITCHES) and any(re.fullmatch(_ROUTERS, name) for name in stored.names)


def _read(stored: Checkpoint) -> ImportedCheckpoint:
    fields = OwnFields(stored)
    kinds = (*_FAMILIES, *(f"{family}{_ENDING}" for family in _FAMILIES))
    family = fields.one_of("model_type", *kinds).removesuffix(_ENDING)
    fields.one_of("granularity", "attn_sequence")
    switch = next((name for name in _SWITCHES if name in fields.config), _SWITCHES[0])
    layers = fields.switched_layers(switch)
    threshold = fields.number("threshold", 0.5)
    if fields.flag("train_threshold", default=False):
        raise fields.error("train_threshold", "false, as no release of MindSkip says how it is stored", True)
    fields.drop(*_TRAINING)
    shape = (1, fields.size("hidden_size"))
    origins = {
        f"model.layers.{layer}.mod_router.weight": Origin((f"model.layers.{layer}.router.weight",), (shape,))
        for layer in layers
    }
    decision = {"rule": "router", "threshold": threshold, "comparison": ">="}
    facts = _FACTS | {"routed_layers": layers, "decision": decision}
    config = fields.config | {"model_type": family}
    return under_contract(stored, _TITLE, _ROUTERS, origins, facts, config, [_DIFFERENCES])


MINDSKIP = Importer("mindskip", _read, _recognises)

__all__ = ["MINDSKIP"]
