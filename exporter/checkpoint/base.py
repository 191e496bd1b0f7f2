"""What every kind of checkpoint offers to the rest: a Hugging Face config, and tensors read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np


class Checkpoint(ABC):
    """A model on disk, under Hugging Face names and layouts whatever the format.

    Attributes:
        source: what the user named, for messages and the manifest.
        config: the fields of ``config.json``.
        files: small text files that a bundle carries on, name -> content: ``tokenizer.json`` where there is a
            tokenizer, ``chat_template.jinja`` where there is a template, ``generation_config.json``
            (``eos_token_id``).
        turn_ends: tokens that end an answer in a chat, id -> text, whether or not ``config`` or
            ``generation_config.json`` names them.
        notes: what had to be assumed or changed when the checkpoint was read, one plain line each.
        origin: the directory or the .gguf file, where transformers can load it by itself; None: it cannot.
    """

    source: str
    config: dict[str, Any]
    files: dict[str, bytes]
    turn_ends: Mapping[int, str] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    origin: Path | None = None

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. Raises DynexportError when there is none of that name."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor as float32 in memory of its own; bf16 and fp16 are widened, quantised blocks expanded.

        Raises:
            DynexportError: when it is absent, truncated or of an unsupported dtype; it names the file.
        """


@dataclass(frozen=True)
class Importer:
    """Reads a directory that other routing code has written (docs/importing.md).

    Attributes:
        name: on the command line and in manifests.
        read: what turns the directory, as it stands, into a checkpoint in our terms, whose ``notes`` say what changes;
            raises DynexportError for what it cannot read.
    """

    name: str
    read: Callable[[Checkpoint], Checkpoint]
