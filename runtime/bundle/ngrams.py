"""A table of short token sequences, each with the token that is likeliest to follow (docs/bundle.md, n-gram table)."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError

Array = np.ndarray
# Most tokens of a context.
LONGEST_CONTEXT = 4
# A stored probability is a whole number of these parts.
PARTS = 255
ENTRY_BYTES = 8 + 4 + 1
_FACTOR, _SHIFT, _BITS = 0x9E3779B97F4A7C15, 29, (1 << 64) - 1


def context_keys(contexts: Array) -> Array:
    """Return the keys of contexts of one length, uint64 [contexts], from their ids, int64 [contexts, length]."""
    keys = np.full(len(contexts), _FACTOR, np.uint64)
    for ids in contexts.T[::-1]:
        keys = (keys ^ ids.astype(np.uint64)) * np.uint64(_FACTOR)
        keys ^= keys >> np.uint64(_SHIFT)
    return keys


def end_keys(ids: Sequence[int]) -> list[int]:
    """Return the keys of the last id, of the last two, .., of all."""
    key, keys = _FACTOR, []
    for token in reversed(ids):
        key = ((key ^ token) * _FACTOR) & _BITS
        key ^= key >> _SHIFT
        keys.append(key)
    return keys


class NgramTable:
    """For each stored context of 1 to 4 tokens the likeliest next token, and the probability that the model chooses it.

    Args:
        keys: the contexts' keys, uint64 [entries], ascending.
        tokens: the tokens that follow, int32 [entries].
        parts: their probabilities, uint8 [entries], 1 to 255 in 255ths.
    """

    def __init__(self, keys: Array, tokens: Array, parts: Array) -> None:
        self._keys = array("Q", keys.astype(np.uint64).tobytes())
        # Keys are spread evenly: where those with the same first 16 bits begin.
        first = np.searchsorted(keys, np.arange(1 << 16, dtype=np.uint64) << np.uint64(48))
        self._first = [*first.tolist(), len(keys)]
        self._tokens = array("i", tokens.astype(np.int32).tobytes())
        self._parts = parts.astype(np.uint8).tobytes()

    def __len__(self) -> int:
        return len(self._keys)

    def likeliest(self, ids: Sequence[int]) -> tuple[int, float] | None:
        """Return the token that the longest stored end of some ids says, and its probability; None if none is stored.

        Args:
            ids: at most the last four token ids of a text.
        """
        for key in reversed(end_keys(ids)):
            after = self._first[(key >> 48) + 1]
            place = bisect_left(self._keys, key, self._first[key >> 48], after)
            if place < after and self._keys[place] == key:
                return self._tokens[place], self._parts[place] / PARTS
        return None

    def content(self) -> bytes:
        """Return the table as the content of a file: all keys, all tokens, all probabilities, little-endian."""
        keys, tokens = np.array(self._keys, "<u8"), np.array(self._tokens, "<i4")
        return keys.tobytes() + tokens.tobytes() + self._parts

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> NgramTable | None:
        """Return a bundle's table, or None if it has none.

        Raises:
            DynexportError: for a file that is not a table for this vocabulary.
        """
        found = bundle.manifest.ngrams
        if found is None:
            return None
        content = bundle.read(found.file)
        return cls.parsed(content, found.entries, bundle.manifest.model.vocab_size, bundle.path / found.file)

    @classmethod
    def parsed(cls, content: bytes, entries: int, vocabulary: int, where: Path) -> NgramTable:
        """Return the table of a file's content.

        Args:
            content: the content.
            entries: number of entries that it should have.
            vocabulary: number of token ids of the model.
            where: the file, for errors.

        Raises:
            DynexportError: for another size, keys that do not ascend, ids beyond the vocabulary, or a probability of 0.
        """

        def refuse(expected: str, found: object) -> DynexportError:
            return DynexportError(f"{where}: expected {expected}, found {found}; make it again: calibrate --ngrams")

        if len(content) != entries * ENTRY_BYTES:
            raise refuse(f"{entries * ENTRY_BYTES} bytes for {entries} entries", len(content))
        keys = np.frombuffer(content, "<u8", entries)
        tokens = np.frombuffer(content, "<i4", entries, 8 * entries)
        parts = np.frombuffer(content, np.uint8, entries, 12 * entries)
        if not (keys[1:] > keys[:-1]).all():
            raise refuse("ascending keys", "others")
        if (outside := tokens[(tokens < 0) | (tokens >= vocabulary)]).size:
            raise refuse(f"token ids 0..{vocabulary - 1}", int(outside[0]))
        if not parts.all():
            raise refuse(f"probabilities of 1..{PARTS} parts", 0)
        return cls(keys, tokens, parts)


__all__ = ["ENTRY_BYTES", "LONGEST_CONTEXT", "PARTS", "NgramTable", "context_keys", "end_keys"]
