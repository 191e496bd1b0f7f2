"""A Hugging Face directory, as ``save_pretrained`` writes it and the hub serves it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.checkpoint.kinds import refuse_adapter, refuse_foreign_tensors, refuse_quantised
from dynexport.exporter.checkpoint.safetensors_file import SafetensorsFile
from dynexport.exporter.checkpoint.small_files import find_file, parse_object, read_file
from dynexport.exporter.checkpoint.tokenizer_files import read_tokenizer, turn_ends
from dynexport.runtime.bundle.errors import DynexportError

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Mistral's repositories also hold a copy of the weights under other names.
_SECOND_COPY = "consolidated"
_GENERATION = "generation_config.json"


class SafetensorsDirectory(Checkpoint):
    """A directory with ``config.json`` and one safetensors file, or shards with an index; pickles are refused.

    Args:
        directory: the directory.
        source: the path or hub id that the user gave; None for the directory.
        build_tokenizer: whether to build its tokenizer; False if the user names another.

    Raises:
        DynexportError: when a file or tensor is missing or damaged, or the model is an adapter or quantised.
    """

    def __init__(self, directory: Path, source: str | None = None, *, build_tokenizer: bool = True) -> None:
        self.source = str(directory) if source is None else source
        refuse_adapter(directory)
        self.origin = directory
        self.config = _read_config(directory)
        refuse_quantised(self.config, self.source)
        tokenizer = read_tokenizer(directory, build=build_tokenizer)
        self.files, self.notes = tokenizer.files, tokenizer.notes
        self.turn_ends = turn_ends(self.files)
        if path := find_file(directory, _GENERATION):
            self.files[_GENERATION] = read_file(path)
        self._homes = _find_tensors(directory)
        refuse_foreign_tensors(self.names, self.source)
        self._check_other_files(directory)

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._homes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DynexportError when there is none of that name."""
        return self._home(name).shape(name)

    def stored_type(self, name: str) -> str:
        """Name of a tensor's dtype as its file has it, such as BF16. Raises DynexportError when there is none."""
        return self._home(name).stored_type(name)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32. Raises DynexportError when it is absent, unreadable or of another dtype."""
        return self._home(name).read(name)

    def read_item(self, name: str, item: int) -> np.ndarray:
        """Return one entry along the first axis of a tensor, as ``read``; an IndexError where there is none."""
        return self._home(name).read_item(name, item)

    def read_bytes(self, name: str, item: int) -> np.ndarray:
        """Return one entry along the first axis of a tensor of bytes, uint8; errors as for ``read_item``."""
        return self._home(name).read_bytes(name, item)

    def _check_other_files(self, directory: Path) -> None:
        """Refuse other files with tensors that the model's own files lack: they may be routers or adapters."""
        own = {home.path.name for home in self._homes.values()}
        for path in sorted(directory.glob("*.safetensors")):
            if path.name in own or path.name.startswith(_SECOND_COPY) or not path.is_file():
                continue
            more = [name for name in SafetensorsFile(path).names if name not in self._homes]
            if more:
                raise DynexportError(
                    f"{path}: tensor {more[0]:.120}: expected all weights of the model in its own files, found "
                    f"{len(more)} more tensors here; add them to {_WEIGHTS}, or move this file away"
                )

    def _home(self, name: str) -> SafetensorsFile:
        home = self._homes.get(name)
        if home is None:
            raise DynexportError(
                f"{self.source}: no tensor {name} among its {len(self._homes)}; "
                "config.json describes another model, use the one that was saved with the weights"
            )
        return home


def _read_config(directory: Path) -> dict[str, Any]:
    path = find_file(directory, "config.json")
    if path is None:
        hint = "; name the .gguf file itself" if any(directory.glob("*.gguf")) else ""
        raise DynexportError(f"{directory}: expected config.json in a Hugging Face model directory, found none{hint}")
    return parse_object(read_file(path), path)


def _find_tensors(directory: Path) -> dict[str, SafetensorsFile]:
    """Return the file of each tensor, by tensor name."""
    if path := find_file(directory, _WEIGHTS):
        file = SafetensorsFile(path)
        return dict.fromkeys(file.names, file)
    if path := find_file(directory, _INDEX):
        return _read_shards(directory, path)
    if any(directory.glob("pytorch_model*.bin*")) or any(directory.glob("*.pth")):
        raise DynexportError(
            f"{directory}: expected {_WEIGHTS}, found only pickled weights (pytorch_model.bin); "
            "pickles can run code and are not loaded, re-save the model as safetensors with save_pretrained"
        )
    raise DynexportError(f"{directory}: expected {_WEIGHTS} or {_INDEX}, found neither; add the model's weights")


def _read_shards(directory: Path, index: Path) -> dict[str, SafetensorsFile]:
    """Return the shard of each tensor, by name, including tensors that the index does not list, as in transformers."""
    weights = parse_object(read_file(index), index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise DynexportError(f'{index}: expected an object "weight_map" of tensor names, found {weights!r:.80}')
    shards = {str(shard): _open_shard(directory, index, shard) for shard in set(map(str, weights.values()))}
    homes: dict[str, SafetensorsFile] = {}
    for shard, file in sorted(shards.items()):
        for name in file.names:
            if weights.setdefault(name, shard) != shard:
                raise DynexportError(
                    f"{index}: tensor {name!r:.120}: expected in {weights[name]!r:.120} alone, found in {shard} too; "
                    "download the shards again"
                )
            homes[name] = file
    for name, shard in weights.items():
        if name not in homes:
            raise DynexportError(f"{index}: tensor {name!r}: expected in {shard}, not found there; download both again")
    return homes


def _open_shard(directory: Path, index: Path, shard: str) -> SafetensorsFile:
    """Open a shard; it must lie beside the index, so that an index cannot point to other files."""
    if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
        raise DynexportError(f"{index}: expected plain names of .safetensors files beside it, found {shard!r}")
    path = find_file(directory, shard)
    if path is None:
        raise DynexportError(f"{index}: names the shard {shard}, which is not there; complete the download")
    return SafetensorsFile(path)
