"""Checkpoints of the package mixture-of-depth 1.2.0 (astramind-ai), read as Mixture-of-Depths under our contract."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.runtime.bundle.errors import DynexportError

# The package puts a router and a wrapped layer, its "block", in place of a layer.
_PART = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(block|router)\.(.+)")
_ROUTER = {"weight_predictor.weight": "mod_router.weight", "weight_predictor.bias": "mod_router.bias"}

# Fields that the package's code fixes for every checkpoint.
_FACTS = {
    "strategy": "mod",
    "router_input": "hidden",
    "gate": "raw",
    "combine": "replace",
    "positions": "original",
}
# Fields that the package's code fixes too, but the contract cannot match exactly; config.json may change them.
_CHOICES = {"capacity": 0.125, "rounding": "floor", "prefill": "topk", "decision": {"rule": "always"}}
_NOTES = {
    "capacity": (
        "capacity: 0.125 as in the package's code, because its checkpoints do not store it; "
        'if the model was trained with another value, set "capacity" under "dynexport" in config.json'
    ),
    "prefill": (
        "prompts: the k = max(1, floor(capacity * tokens)) best tokens run in a routed layer; the package compares "
        "strictly with the k-th score, so wherever k > 1 it runs one token less than this export"
    ),
    "decision": (
        "generated tokens: run in every routed layer, as in the package, whose k is 1 of 1 for a single token, so "
        'decoding skips nothing; set "decision" under "dynexport" in config.json for a rule that skips'
    ),
}
_HALVES = ("float16", "bfloat16")


class AstramindCheckpoint(Checkpoint):
    """A checkpoint of the package's ``save_pretrained``, with Hugging Face names and a ``mod`` contract.

    Args:
        stored: the checkpoint under its stored names. Fields under ``"dynexport"`` in its config.json override the
            package's defaults.

    Raises:
        DynexportError: when there is no router, a router or its layer is incomplete or has a wrong shape, or
            config.json contradicts the package's code.
    """

    def __init__(self, stored: Checkpoint) -> None:
        self.source, self.files, self.turn_ends = stored.source, stored.files, stored.turn_ends
        self._stored = stored
        self._stored_names = _rename(stored)
        contract = _contract(stored, _routed_layers(stored))
        self.config = stored.config | {"dynexport": contract}
        self.notes = (*stored.notes, *_notes(stored.config))

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._stored_names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises DynexportError for an unknown name."""
        return self._stored.shape(self._stored_name(name))

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32. Raises DynexportError when it is absent, unreadable or of another dtype."""
        return self._stored.read(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        if name not in self._stored_names:
            raise DynexportError(
                f"{self.source}: no tensor {name} among its {len(self._stored_names)}; "
                "config.json describes another model, use the one that was saved with the weights"
            )
        return self._stored_names[name]


def _rename(stored: Checkpoint) -> dict[str, str]:
    """Return the stored name of every tensor by its name in the contract."""
    names: dict[str, str] = {}
    for name in stored.names:
        ours = _our_name(stored, name)
        if ours in names:
            raise DynexportError(
                f"{stored.source}: tensor {name}: expected one tensor for {ours}, found {names[ours]} as well; "
                "the directory mixes two checkpoints, save the model again"
            )
        names[ours] = name
    return names


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
    """Return the contract's fields; config.json overrides the package's defaults, but not its fixed fields."""
    facts = _FACTS | {"routed_layers": layers}
    declared = stored.config.get("dynexport", {})
    if not isinstance(declared, dict):
        raise DynexportError(f"{stored.source}: config.json: dynexport: expected an object, found {declared!r:.80}")
    for field, fact in facts.items():
        if declared.get(field, fact) != fact:
            raise DynexportError(
                f"{stored.source}: config.json: dynexport.{field}: expected {fact!r}, as mixture-of-depth computes, "
                f"found {declared[field]!r:.80}; leave the field out"
            )
    return facts | _CHOICES | declared


def _notes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return notes for the user about defaults and about precision."""
    notes = [note for field, note in _NOTES.items() if field not in config.get("dynexport", {})]
    dtype = config.get("torch_dtype", config.get("dtype"))
    if dtype in _HALVES:
        notes.append(
            f"scores: float32 in comparisons and as the factor; the package rounds them to {dtype}, where near scores "
            "become equal and all that equal the k-th are left out"
        )
    return tuple(notes)


ASTRAMIND = Importer("astramind", AstramindCheckpoint)

__all__ = ["ASTRAMIND"]
