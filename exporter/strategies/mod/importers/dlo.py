"""DLO (LLaMA-DLO): model_type llama_dlo, whose whole blocks are skipped, and llama_dlo_exattn, whose MLPs are."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.strategies.mod.importers.imported import (
    ImportedCheckpoint,
    Origin,
    under_contract,
)
from dynexport.exporter.strategies.mod.importers.own_fields import OwnFields

_TITLE = "DLO"
_TARGETS = {"llama_dlo": "block", "llama_dlo_exattn": "mlp"}
_ROUTERS = r"model\.routers\..+"
_FACTS: dict[str, Any] = {
    "strategy": "mod",
    "skipped_kv": "none",
    "router_input": "hidden",
    "router": {"kind": "linear"},
    "decision": {"rule": "router", "threshold": 0.5, "comparison": ">"},
    "positions": "original",
}
_TRAINING = ("dlo_capacity", "dlo_loss_coefficient", "dlo_loss_type", "gate_init_method")
_CACHES = "caches: those of the tokens that ran in a block; the authors' code has none and computes every text anew"


def _recognises(stored: Checkpoint) -> bool:
    return stored.config.get("model_type") in _TARGETS


def _read(stored: Checkpoint) -> ImportedCheckpoint:
    fields = OwnFields(stored)
    target = _TARGETS[fields.one_of("model_type", *_TARGETS)]
    layers = fields.switched_layers("is_dlo")
    facts = _FACTS | {"target": target, "routed_layers": layers} | _gate(fields)
    fields.drop(*_TRAINING)
    shape = (1, fields.size("hidden_size"))
    origins = {
        f"model.layers.{layer}.mod_router.weight": Origin((f"model.routers.{layer}.weight",), (shape,))
        for layer in layers
    }
    config = fields.config | {"model_type": "llama"}
    return under_contract(stored, _TITLE, _ROUTERS, origins, facts, config, [_CACHES])


def _gate(fields: OwnFields) -> dict[str, Any]:
    """Return the gate: the MLP's branch times factor / 2 + (sigmoid - 1/2) gap, or as it is."""
    factor, gap = fields.number("scale_factor", 2.0), fields.number("scale_gap", 0.05)
    if not fields.flag("rescale_hidden_states", default=True):
        return {"gate": "none"}
    return {"gate": "affine", "affine": [0.5 * (factor - gap), gap]}


DLO = Importer("dlo", _read, _recognises)

__all__ = ["DLO"]
