"""The interface of every kind of checkpoint: a Hugging Face config, and tensors read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.blocks import Blocks, Form


class Checkpoint(ABC):
    """A model on disk, under Hugging Face names and layouts whatever the format.

    Attributes:
        source: the path or hub id that the user gave, for messages and the manifest.
        config: the fields of ``config.json``.
        files: name -> content of the small text files that are copied into the bundle: ``tokenizer.json`` if there
            is a tokenizer, ``chat_template.jinja`` if there is a template, ``generation_config.json``.
        turn_ends: tokens that end an answer in a chat, id -> text, whether or not ``config`` or
            ``generation_config.json`` names them.
        notes: assumptions and changes made when the checkpoint was read, one line each.
        origin: the directory or .gguf file if transformers can load it directly; else None.
        importer: the name of the importer that has read it; None for a checkpoint that needs none.
    """

    source: str
    config: dict[str, Any]
    files: dict[str, bytes]
    turn_ends: Mapping[int, str] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    origin: Path | None = None
    importer: str | None = None

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. Raises DynexportError when there is none of that name."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32 in its own memory; bf16 and fp16 are widened, quantised blocks expanded.

        Raises:
            DynexportError: when it is absent, truncated or of an unsupported dtype.
        """

    def read_item(self, name: str, item: int) -> np.ndarray:
        """Return one entry along the first axis of a tensor, as ``read``; an IndexError where there is none."""
        found: np.ndarray = self.read(name)[item]
        return found

    def form(self, name: str) -> Form | None:
        """Return the form of ``blocks``, without reading the tensor; None for a tensor that is stored otherwise."""
        self.shape(name)
        return None

    def stored_type(self, name: str) -> str:
        """Return the name of the type that a tensor is stored in, such as F16; "" where no type matters."""
        self.shape(name)
        return ""

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix as the blocks of integers that the file holds, with the rows of ``read``.

        Returns:
            The blocks, whose values are those of ``read``; None for a tensor that is stored otherwise.

        Raises:
            DynexportError: when it is absent or truncated.
        """
        self.shape(name)
        return None


@dataclass(frozen=True)
class Importer:
    """Reads a directory that other routing code has written (docs/importing.md).

    Attributes:
        name: the importer's name on the command line and in manifests.
        read: converts the directory's checkpoint to dynexport's names and contract; its ``notes`` list the changes.
            It raises DynexportError for a directory that it cannot read.
        recognises: returns whether a checkpoint was written by that code, from its config and the names of its tensors.
    """

    name: str
    read: Callable[[Checkpoint], Checkpoint]
    recognises: Callable[[Checkpoint], bool]
