"""Tied embeddings as transformers' from_pretrained handles them: stored tensors override config.json."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from dynexport.exporter.bundle.weights import EMBEDDING, HEAD, WeightReader
from dynexport.exporter.families.architecture import Architecture, Source


def tied_as_stored(reader: WeightReader) -> Architecture:
    """Return the architecture with embedding and head tied, or not, as the checkpoint stores them.

    Where config.json ties the two: one that is stored alone serves as both, two that are equal are one, and two that
    differ are not tied. A head that is not tied has to be stored.

    Raises:
        DynexportError: when one of them is unreadable.
    """
    architecture, head = reader.architecture, reader.stored_names(HEAD)
    if not architecture.tied_embeddings or not head:
        return architecture
    if not reader.stored_names(EMBEDDING):
        return replace(architecture, sources={**architecture.sources, EMBEDDING: Source(tuple(head))})
    # One of these in memory at a time: with a large vocabulary they are gigabytes.
    if _digest(reader, EMBEDDING) == _digest(reader, HEAD):
        return architecture
    return replace(architecture, tied_embeddings=False)


def _digest(reader: WeightReader, name: str) -> tuple[tuple[int, ...], str]:
    (stored,) = reader.stored_names(name)
    value = reader.checkpoint.read(stored)
    return value.shape, hashlib.sha256(value.data).hexdigest()
