"""Entries of prompts that have run, kept for later prompts that begin with the same tokens."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from dynexport.runtime.execution.batch import EvenChunks
from dynexport.runtime.execution.mark import Saved

Array = np.ndarray


class PrefixStore:
    """Saved parts of rows, each found by the tokens of its row up to its end and the layers that they ran in.

    A key is the SHA-256 of the key before it and the part's tokens. When the memory is full, the part that was not used
    for the longest time goes; of one row the later parts go first.

    Args:
        limit: memory for all parts, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._parts: OrderedDict[bytes, Saved] = OrderedDict()  # the least recently used first
        self._before: dict[bytes, bytes] = {}

    @property
    def size(self) -> int:
        """Memory in use, in bytes."""
        return self._bytes

    @staticmethod
    def root(layers: Sequence[int]) -> bytes:
        """Return the first key of rows whose tokens run in these layers."""
        return hashlib.sha256(np.array(layers, np.int64).tobytes()).digest()

    @staticmethod
    def key(before: bytes, tokens: Array) -> bytes:
        """Return the key of a part, int64 [n] tokens, that follows the part of another key."""
        return hashlib.sha256(before + tokens.astype(np.int64).tobytes()).digest()

    def longest(self, root: bytes, tokens: Array, parts: EvenChunks) -> Iterator[tuple[bytes, Saved]]:
        """Yield the keys and parts of the longest saved prefix of a prompt, and mark them as used.

        Args:
            root: the first key.
            tokens: the prompt's tokens, int64 [n]. The last one is never part of the prefix: its logits are needed.
            parts: how rows are cut into parts.
        """
        found: list[tuple[bytes, Saved]] = []
        key, start = root, 0
        while (stop := start + parts.size(start)) < len(tokens):
            key = self.key(key, tokens[start:stop])
            if key not in self._parts:
                break
            found.append((key, self._parts[key]))
            start = stop
        if found:
            self._use(found[-1][0])
        yield from found

    def __contains__(self, key: bytes) -> bool:
        return key in self._parts

    def add(self, before: bytes, key: bytes, saved: Saved) -> None:
        """Keep a part that follows another one; one larger than the memory is not kept.

        Args:
            before: the key of the part before it, or the root.
            key: the part's key.
            saved: its entries.
        """
        if key in self._parts or saved.size > self._limit:
            return
        self._parts[key], self._before[key] = saved, before
        self._bytes += saved.size
        self._use(key)
        while self._bytes > self._limit:
            oldest, part = self._parts.popitem(last=False)
            del self._before[oldest]
            self._bytes -= part.size

    def _use(self, key: bytes) -> None:
        """Mark a part and those before it as used, the first one last: the others cannot be found without it."""
        while key in self._parts:
            self._parts.move_to_end(key)
            key = self._before[key]


__all__ = ["PrefixStore"]
