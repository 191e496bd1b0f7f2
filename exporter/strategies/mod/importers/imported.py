"""A checkpoint of other routing code under the contract's names: what its importers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.runtime.bundle.errors import DynexportError

_UNREAD = ("architectures", "auto_map")  # they name classes of the other code


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        names: its names in the checkpoint; several are combined.
        shapes: the shape that each of them must have; empty where the graph checks it.
        combine: makes the tensor from these; None for one that is taken as it is.
        shape: the shape of what ``combine`` makes; None for that of the first.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    combine: Callable[[list[np.ndarray]], np.ndarray] | None = None
    shape: tuple[int, ...] | None = None


Origins = dict[str, Origin]


class ImportedCheckpoint(Checkpoint):
    """Tensors of a checkpoint under other names, some made from several.

    Args:
        stored: the checkpoint under its stored names.
        origins: where each tensor comes from.
        config: the fields of config.json.
        notes: lines for the user beside those of ``stored``.
    """

    def __init__(
        self, stored: Checkpoint, origins: Origins, config: Mapping[str, Any], notes: Iterable[str] = ()
    ) -> None:
        self.source, self.files, self.turn_ends = stored.source, stored.files, stored.turn_ends
        self.config = dict(config)
        self.notes = (*stored.notes, *notes)
        self._stored, self._origins = stored, origins

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._origins.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises DynexportError for an unknown name."""
        origin = self._origin(name)
        return self._stored.shape(origin.names[0]) if origin.shape is None else origin.shape

    def stored_type(self, name: str) -> str:
        """Return the type in which a tensor is stored. Raises DynexportError for an unknown name."""
        return self._stored.stored_type(self._origin(name).names[0])

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32. Raises DynexportError when it is absent, unreadable or of another dtype."""
        origin = self._origin(name)
        parts = [self._stored.read(part) for part in origin.names]
        return parts[0] if origin.combine is None else np.ascontiguousarray(origin.combine(parts), dtype=np.float32)

    def _origin(self, name: str) -> Origin:
        origin = self._origins.get(name)
        if origin is None:
            raise DynexportError(
                f"{self.source}: no tensor {name:.120} among its {len(self._origins)}; "
                "config.json describes another model, use the one that was saved with the weights"
            )
        return origin


def renamed(stored: Checkpoint, plain: Callable[[str], str]) -> Checkpoint:
    """Return a checkpoint with every tensor under the name that ``plain`` gives it.

    Raises:
        DynexportError: when two tensors get the same name.
    """
    origins: Origins = {}
    for name in stored.names:
        ours = plain(name)
        if ours in origins:
            raise _twice(stored, name, ours, origins[ours].names[0])
        origins[ours] = Origin((name,))
    return ImportedCheckpoint(stored, origins, stored.config)


def imported(
    stored: Checkpoint, origins: Origins, contract: Mapping[str, Any], config: Mapping[str, Any], notes: Iterable[str]
) -> ImportedCheckpoint:
    """Return a checkpoint with its contract; tensors that ``origins`` does not use keep their names.

    Args:
        stored: the checkpoint, under names that are Hugging Face's but for the routers.
        origins: the tensors that are made from others, by their name in the contract.
        contract: the contract's fields.
        config: config.json without what the importer has read.
        notes: assumptions and changes, one line each.

    Raises:
        DynexportError: when a tensor that ``origins`` uses is absent or of another shape, or one has both names.
    """
    for origin in origins.values():
        _check(stored, origin)
    used = {name for origin in origins.values() for name in origin.names}
    rest = {name: Origin((name,)) for name in stored.names if name not in used}
    for name in sorted(origins.keys() & rest.keys()):
        raise _twice(stored, origins[name].names[0], name, name)
    fields = {name: value for name, value in config.items() if name not in _UNREAD}
    return ImportedCheckpoint(stored, {**origins, **rest}, {**fields, "dynexport": dict(contract)}, notes)


def under_contract(
    stored: Checkpoint,
    code: str,
    routers: str,
    origins: Origins,
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    notes: Iterable[str] = (),
) -> ImportedCheckpoint:
    """Return a checkpoint of code that nobody could try on trained weights, with its contract.

    Args:
        stored: the checkpoint, under names that are Hugging Face's but for the routers.
        code: the code's name, for messages.
        routers: a regular expression for the names of routers, all of which must be used.
        origins: the tensors that are made from others, by their name in the contract.
        facts: the contract's fields that the code fixes for this checkpoint.
        config: config.json without what the importer has read.
        notes: assumptions and changes beside the one that no trained model was at hand, one line each.

    Raises:
        DynexportError: as ``imported``, ``merged_contract`` and ``check_no_others``.
    """
    check_no_others(stored, routers, origins, code)
    return imported(stored, origins, merged_contract(stored, code, facts), config, [untried(code), *notes])


def _twice(stored: Checkpoint, name: str, ours: str, other: str) -> DynexportError:
    return DynexportError(
        f"{stored.source}: tensor {name:.120}: expected one tensor for {ours:.120}, found {other:.120} as well; "
        "the directory mixes two checkpoints, save the model again"
    )


def _check(stored: Checkpoint, origin: Origin) -> None:
    for number, name in enumerate(origin.names):
        expected = f"shape {list(origin.shapes[number])}" if origin.shapes else "it"
        found = f"shape {list(stored.shape(name))}" if name in stored.names else "no such tensor"
        if found == "no such tensor" or (origin.shapes and found != expected):
            raise DynexportError(
                f"{stored.source}: tensor {name:.120}: expected {expected} by config.json, found "
                f"{found.removeprefix('shape ')}; complete the checkpoint or correct its config.json"
            )


def merged_contract(
    stored: Checkpoint, code: str, facts: Mapping[str, Any], choices: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the contract's fields: what the code computes, with what config.json chooses under "dynexport" on top.

    Args:
        stored: the checkpoint.
        code: the code's name, for messages.
        facts: fields that the code fixes for every checkpoint, which config.json may repeat but not change.
        choices: fields that config.json may change.

    Raises:
        DynexportError: when config.json contradicts the code.
    """
    declared = stored.config.get("dynexport", {})
    if not isinstance(declared, dict):
        raise DynexportError(f"{stored.source}: config.json: dynexport: expected an object, found {declared!r:.80}")
    for field, fact in facts.items():
        if declared.get(field, fact) != fact:
            raise DynexportError(
                f"{stored.source}: config.json: dynexport.{field}: expected {fact!r}, as {code} computes, "
                f"found {declared[field]!r:.80}; leave the field out"
            )
    return {**facts, **(choices or {}), **declared}


def check_no_others(stored: Checkpoint, routers: str, origins: Origins, code: str) -> None:
    """Raise DynexportError for a tensor that is named like a router, and that no origin uses.

    Args:
        stored: the checkpoint.
        routers: a regular expression for the names of routers.
        origins: those that are read.
        code: the code's name, for messages.
    """
    used = {name for origin in origins.values() for name in origin.names}
    for name in sorted(set(stored.names) - used):
        if re.fullmatch(routers, name):
            raise DynexportError(
                f"{stored.source}: tensor {name:.120}: expected the routers of {code} in the layers that config.json "
                "gives them, found one more; it is of another version of that code, or config.json of another model"
            )


def untried(title: str) -> str:
    """Return the note that no trained model was at hand."""
    return (
        f"import of {title}: it was tried on small random models only, as no trained checkpoint was at hand; compare "
        "answers with those of the model's own code before you rely on them"
    )


__all__ = [
    "ImportedCheckpoint",
    "Origin",
    "Origins",
    "check_no_others",
    "imported",
    "merged_contract",
    "renamed",
    "under_contract",
    "untried",
]
