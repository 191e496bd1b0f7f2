"""A checkpoint with the LoRA adapter of a peft directory merged into its weights, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.checkpoint.blocks import Blocks, Form
from dynexport.exporter.checkpoint.hub import is_hub_id
from dynexport.exporter.checkpoint.lora import ADAPTER_FILE, merged, read_lora_config
from dynexport.exporter.checkpoint.safetensors_file import SafetensorsFile
from dynexport.exporter.checkpoint.small_files import find_file, parse_object, read_file
from dynexport.runtime.bundle.errors import DynexportError

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# Before the name of a module of the base.
_PREFIX = "base_model.model."
# Ends of names -> the part of an adapter. Embeddings store both factors transposed.
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_magnitude_vector": "lengths",
    ".lora_magnitude_vector.weight": "lengths",
}
_EMBEDDING = ".lora_embedding_A"


@dataclass(frozen=True)
class _Change:
    """The names of a matrix's adapter tensors in the file; ``turned`` for a weight that is stored [K, N]."""

    module: str
    down: str
    up: str
    lengths: str | None
    turned: bool


class AdaptedCheckpoint(Checkpoint):
    """A base checkpoint whose matrices have an adapter added, and whose other tensors may be replaced by its own.

    The routing contract in the adapter's ``config.json``, under "dynexport", replaces the base's.

    Args:
        base: the checkpoint that the adapter was trained on.
        directory: the adapter's directory, as peft's ``save_pretrained`` writes it.

    Raises:
        DynexportError: when the adapter is damaged, of another kind or for another base, or has a tensor without a
            use.
    """

    def __init__(self, base: Checkpoint, directory: Path) -> None:
        self._base, self._directory = base, directory
        self._lora = read_lora_config(directory)
        self._file = _open_weights(directory)
        self.source, self.files, self.turn_ends = base.source, base.files, base.turn_ends
        self.config = base.config | _contract(directory)
        self.notes = (*base.notes, *self._other_base())
        self._changes, self._own = self._sorted()

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors: the base's, and those that only the adapter has, such as routers."""
        return dict.fromkeys([*self._base.names, *self._own])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DynexportError when there is none of that name."""
        return self._file.shape(self._own[name]) if name in self._own else self._base.shape(name)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32, with the adapter's part; errors as for ``Checkpoint.read``."""
        weight = self._file.read(self._own[name]) if name in self._own else self._base.read(name)
        change = self._changes.get(name)
        if change is None:
            return weight
        read, scale = self._file.read, self._lora.scale(change.module)
        lengths = None if change.lengths is None else read(change.lengths).reshape(-1)
        total = merged(weight.T if change.turned else weight, read(change.down), read(change.up), scale, lengths)
        return np.ascontiguousarray(total.T) if change.turned else total

    def form(self, name: str) -> Form | None:
        """Return the form of ``blocks``; None for a tensor that the adapter changes, which has no blocks any more."""
        return None if self._is_new(name) else self._base.form(name)

    def stored_type(self, name: str) -> str:
        """Return the name of the type that a tensor is stored in; F32 for one that the adapter changes."""
        return "F32" if self._is_new(name) else self._base.stored_type(name)

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix's blocks; None for a tensor that the adapter changes."""
        return None if self._is_new(name) else self._base.blocks(name)

    def _is_new(self, name: str) -> bool:
        return name in self._own or name in self._changes

    def _other_base(self) -> tuple[str, ...]:
        """Return a note if the adapter names another base; raise DynexportError if both are hub ids."""
        wanted = self._lora.base
        if not wanted or Path(wanted).name.lower() in self.source.lower():
            return ()
        if is_hub_id(wanted) and is_hub_id(self.source) and not Path(self.source).exists():
            raise DynexportError(
                f"{self._directory}: adapter: base_model_name_or_path: expected {self.source:.120}, found "
                f"{wanted:.120}; convert the model that the adapter was trained on"
            )
        return (f"adapter: trained on {wanted:.120} by its config, merged into {self.source:.120} whose shapes fit",)

    def _sorted(self) -> tuple[dict[str, _Change], dict[str, str]]:
        """Return the changes by the base's names, and the names in the file of tensors that stand for themselves."""
        parts: dict[str, dict[str, str]] = {}
        own: dict[str, str] = {}
        for stored in self._file.names:
            if not stored.startswith(_PREFIX):
                raise self._unused(stored, f"a name that begins with {_PREFIX}")
            end = next((end for end in _PARTS if stored.endswith(end)), None)
            if end is not None:
                parts.setdefault(stored.removesuffix(end).removeprefix(_PREFIX), {})[_PARTS[end]] = stored
            elif ".lora_" in stored:
                raise self._unused(stored, "factors of matrices")
            else:
                own[self._own_name(stored)] = stored
        changes = {}
        for module, found in parts.items():
            name = self._base_name(f"{module}.weight")
            changes[name] = self._change(module, name, found)
        return changes, own

    def _own_name(self, stored: str) -> str:
        """Return the name of a tensor that peft stores whole; one that the base has must have its shape."""
        name = self._base_name(stored.removeprefix(_PREFIX).replace(".base_layer.", "."))
        if name in self._base.names and self._base.shape(name) != self._file.shape(stored):
            raise self._misfit(stored, self._base.shape(name), self._file.shape(stored))
        return name

    def _base_name(self, name: str) -> str:
        """Return the base's name of a tensor; bare models store theirs without the first part."""
        bare = name.partition(".")[2]
        return bare if name not in self._base.names and bare in self._base.names else name

    def _change(self, module: str, name: str, found: dict[str, str]) -> _Change:
        """Return the change of a weight, after a check of its tensors' shapes."""
        stored = next(iter(found.values()))
        for part, what in (("down", "lora_A"), ("up", "lora_B")):
            if part not in found:
                raise self._unused(stored, f"{what} of the same module too")
        if self._lora.magnitudes != ("lengths" in found):
            raise self._unused(stored, f"a magnitude vector as use_dora says ({self._lora.magnitudes})")
        if name not in self._base.names:
            raise self._misfit(stored, "a weight of that name", f"none among {len(self._base.names)} tensors")
        weight, down, up = self._base.shape(name), self._file.shape(found["down"]), self._file.shape(found["up"])
        rank, embedding = self._lora.rank_of(module), found["down"].endswith(_EMBEDDING)
        if len(weight) != 2:
            raise self._misfit(stored, "two dimensions", weight)
        straight, turned = ((rank, weight[1]), (weight[0], rank)), ((rank, weight[0]), (weight[1], rank))
        is_turned = embedding or ((down, up) == turned and ((down, up) != straight or self._lora.turned))
        expected = turned if is_turned else straight
        if down != expected[0]:
            raise self._misfit(found["down"], expected[0], down)
        if up != expected[1]:
            raise self._misfit(found["up"], expected[1], up)
        lengths = found.get("lengths")
        if lengths is not None and (embedding or math.prod(self._file.shape(lengths)) != up[0]):
            raise self._misfit(lengths, f"{up[0]} lengths of a matrix's rows", self._file.shape(lengths))
        return _Change(module, found["down"], found["up"], lengths, is_turned)

    def _unused(self, stored: str, expected: str) -> DynexportError:
        return DynexportError(
            f"{self._file.path}: tensor {stored:.160}: expected {expected}, found none that dynexport merges; merge "
            "the adapter with peft (merge_and_unload), save the result with save_pretrained, and convert that"
        )

    def _misfit(self, stored: str, expected: object, found: object) -> DynexportError:
        shown = list(expected) if isinstance(expected, tuple) else expected
        return DynexportError(
            f"{self._file.path}: tensor {stored:.160}: expected {shown} as {self.source:.120} and {ADAPTER_FILE} say, "
            f"found {list(found) if isinstance(found, tuple) else found}; name the model that it was trained on"
            f"{f', {self._lora.base:.120}' if self._lora.base else ''}"
        )


def _open_weights(directory: Path) -> SafetensorsFile:
    path = find_file(directory, _WEIGHTS)
    if path is None and find_file(directory, _PICKLE) is not None:
        raise DynexportError(
            f"{directory}: adapter: expected {_WEIGHTS}, found only pickled weights ({_PICKLE}); pickles can run code "
            "and are not loaded, save the adapter again with save_pretrained(safe_serialization=True)"
        )
    if path is None:
        raise DynexportError(f"{directory}: adapter: expected {_WEIGHTS}, found none")
    return SafetensorsFile(path)


def _contract(directory: Path) -> dict[str, Any]:
    """Return the field "dynexport" of the directory's config.json; empty without one."""
    path = find_file(directory, "config.json")
    fields = {} if path is None else parse_object(read_file(path), path)
    return {"dynexport": fields["dynexport"]} if "dynexport" in fields else {}


__all__ = ["AdaptedCheckpoint"]
