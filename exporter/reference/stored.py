"""Read tensors of a Hugging Face directory with the safetensors package, without code of ``exporter/checkpoint``."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dynexport.runtime.bundle.errors import DynexportError


class Tensors(Protocol):
    """Access to tensors by name; a ``Checkpoint`` has this interface too.

    Attributes:
        source: the path or name that the user gave, for messages.
    """

    source: str

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading its values."""

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32."""


class StoredTensors:
    """The tensors in ``model.safetensors``, or in the shards that its index names.

    Args:
        directory: a checkpoint directory that ``open_checkpoint`` has accepted.
        source: the path or name that the user gave, for messages.
    """

    def __init__(self, directory: Path, source: str) -> None:
        self.source = source
        index = directory / "model.safetensors.index.json"
        files = [directory / "model.safetensors"]
        if not files[0].is_file():
            shards = json.loads(index.read_text())["weight_map"].values()
            files = [directory / Path(shard).name for shard in sorted(set(shards))]
        self._files: dict[str, Path] = {}
        for file in files:
            with self._open(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading its values."""
        with self._open(self._files[name]) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Return a float32 copy of one tensor."""
        with self._open(self._files[name]) as opened:
            return np.array(opened.get_tensor(name).float().numpy(), np.float32)

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DynexportError(f"{file}: expected a safetensors file, found: {error!s:.200}") from error


def read_router_tensor(tensors: Tensors, name: str, expected: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a tensor that the routing contract needs, float32.

    Raises:
        DynexportError: when it is absent, of another shape, or not finite.
    """
    if name not in tensors.names:
        raise DynexportError(
            f"{tensors.source}: tensor {name} is not in the checkpoint, and the routing contract needs it: add it, "
            'or correct "dynexport" in config.json'
        )
    values = tensors.read(name)
    if values.shape != expected:
        raise DynexportError(f"{tensors.source}: tensor {name}: expected shape {expected}, found {values.shape}")
    if not np.isfinite(values).all():
        raise DynexportError(f"{tensors.source}: tensor {name}: expected finite numbers, found NaN or infinity")
    return values
