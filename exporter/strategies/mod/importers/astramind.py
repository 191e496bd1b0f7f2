"""The package mixture-of-depth 1.2.0 (astramind-ai): Mixture-of-Depths whose blocks are chosen by top-k."""

from __future__ import annotations

import re
from typing import Any

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.strategies.mod.importers.imported import (
    ImportedCheckpoint,
    imported,
    merged_contract,
    renamed,
)
from dynexport.runtime.bundle.errors import DynexportError

_TITLE = "mixture-of-depth"
# The package puts a router and a wrapped layer, its "block", in place of a layer.
_PART = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(block|router)\.(.+)")
_ROUTER = {"weight_predictor.weight": "mod_router.weight", "weight_predictor.bias": "mod_router.bias"}

# Fields that the package's code fixes for every checkpoint.
_FACTS: dict[str, Any] = {
    "strategy": "mod",
    "router_input": "hidden",
    "gate": "raw",
    "combine": "replace",
    "positions": "original",
}
# Fields that the package's code fixes too, but a trained model is better off with others; config.json may change them.
_CHOICES: dict[str, Any] = {
    "capacity": 0.125,
    "rounding": "floor",
    "prefill": "topk",
    "boundary": "k-1",
    "decision": {"rule": "always"},
}
_NOTES = {
    "capacity": (
        "capacity: 0.125 as in the package's code, because its checkpoints do not store it; "
        'if the model was trained with another value, set "capacity" under "dynexport" in config.json'
    ),
    "decision": (
        "generated tokens: run in every routed layer, as in the package, whose k is 1 of 1 for a single token, so "
        'decoding skips nothing; set "decision" under "dynexport" in config.json for a rule that skips'
    ),
}
_HALVES = ("float16", "bfloat16")


def _recognises(stored: Checkpoint) -> bool:
    parts = {match[2] for name in stored.names if (match := _PART.fullmatch(name)) and _is_own(match)}
    return parts == {"block", "router"}


def _is_own(match: re.Match[str]) -> bool:
    return match[2] == "block" or match[3].startswith("weight_predictor.")


def _read(stored: Checkpoint) -> ImportedCheckpoint:
    layers = _routed_layers(stored)
    contract = _contract(stored, layers)
    return imported(renamed(stored, lambda name: _our_name(stored, name)), {}, contract, stored.config, _notes(stored))


def _our_name(stored: Checkpoint, name: str) -> str:
    part = _PART.fullmatch(name)
    if part is None:
        return name
    layer, kind, rest = part.groups()
    if kind == "block":
        return f"model.layers.{layer}.{rest}"
    if rest not in _ROUTER:
        raise DynexportError(
            f"{stored.source}: tensor {name}: expected {' and '.join(_ROUTER)} in a router, found {rest}; "
            "it is of another version than 1.2.0 of mixture-of-depth, which cannot be imported"
        )
    return f"model.layers.{layer}.{_ROUTER[rest]}"


def _routed_layers(stored: Checkpoint) -> list[int]:
    """Return the layers with a router, ascending, after a check of each router."""
    parts = [part for name in stored.names if (part := _PART.fullmatch(name))]
    found = {kind: {int(part[1]) for part in parts if part[2] == kind} for kind in ("block", "router")}
    layers = sorted(found["block"] | found["router"])
    if not layers:
        raise DynexportError(
            f"{stored.source}: import astramind: expected routers as mixture-of-depth saves them "
            f"(model.layers.1.router.weight_predictor.weight), found none among {len(stored.names)} tensors; "
            "name the directory of the trained model, or leave the import out"
        )
    for layer in layers:
        _check_router(stored, layer)
        if layer not in found["block"]:
            raise DynexportError(
                f"{stored.source}: layer {layer}: expected its weights under model.layers.{layer}.block beside its "
                "router, found none; complete the checkpoint"
            )
    return layers


def _check_router(stored: Checkpoint, layer: int) -> None:
    hidden = stored.config.get("hidden_size")
    for rest, expected in (("weight_predictor.weight", [1, hidden]), ("weight_predictor.bias", [1])):
        name = f"model.layers.{layer}.router.{rest}"
        found = list(stored.shape(name)) if name in stored.names else "no such tensor"
        if found != expected:
            raise DynexportError(
                f"{stored.source}: tensor {name}: expected shape {expected} by hidden_size {hidden} of config.json, "
                f"found {found}; complete the checkpoint or correct its config.json"
            )


def _contract(stored: Checkpoint, layers: list[int]) -> dict[str, Any]:
    """Return the contract's fields; where config.json has prompts routed causally, there is no boundary."""
    contract = merged_contract(stored, _TITLE, _FACTS | {"routed_layers": layers}, _CHOICES)
    if contract["prefill"] != _CHOICES["prefill"] and "boundary" not in stored.config["dynexport"]:
        del contract["boundary"]
    return contract


def _notes(stored: Checkpoint) -> list[str]:
    """Return notes for the user about defaults and about precision."""
    notes = [note for field, note in _NOTES.items() if field not in stored.config.get("dynexport", {})]
    dtype = stored.config.get("torch_dtype", stored.config.get("dtype"))
    if dtype in _HALVES:
        notes.append(
            f"scores: float32 in comparisons and as the factor; the package rounds them to {dtype}, where near scores "
            "become equal and all that equal the k-th are left out"
        )
    return notes


ASTRAMIND = Importer("astramind", _read, _recognises)

__all__ = ["ASTRAMIND"]
