"""Answers of a bundle that was made from an imported checkpoint: a prompt at once, then token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.execution.executor import Executor

CONTEXT = 48


class ImportedBundle:
    """A bundle on ONNX Runtime, converted from a directory as it is."""

    def __init__(self, directory: Path, bundle: Path, *, static: bool = False) -> None:
        done = convert(directory, bundle, max_length=CONTEXT, golden=False, static=static)
        self.importer, self.notes = done.manifest.source.importer, done.notes
        self.executor = Executor(Bundle.open(bundle), threads=1)

    def answer(self, rows: Sequence[Sequence[int]], prompt: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Logits [tokens, vocabulary] and decisions [decisions, tokens] of every row, as one batch.

        Args:
            rows: tokens, of one length.
            prompt: how many of them are given at once; the others follow one by one.
        """
        executor = self.executor
        cache = executor.full_cache(len(rows), CONTEXT, record=True)
        parts = [[part] for part in executor.prefill(cache, [list(row[:prompt]) for row in rows], all_logits=True)]
        for place in range(prompt, len(rows[0])):
            found = executor.step(cache, [row[place] for row in rows], executor.bundle.depth(None))
            for row, logits in zip(parts, found, strict=True):
                row.append(logits[None])
        logs = [executor.reader.joined(log) for log in cache.logs]
        return [(np.concatenate(row), log.choices) for row, log in zip(parts, logs, strict=True)]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely tokens after a prompt, each fed back."""
        executor = self.executor
        cache = executor.full_cache(1, CONTEXT)
        found = executor.prefill(cache, [list(prompt)])[0]
        tokens = [int(found.reshape(-1, found.shape[-1])[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(executor.step(cache, [tokens[-1]], executor.bundle.depth(None))[0].argmax()))
        return tokens
