"""The model in PyTorch with a bundle's rounded numbers: weights, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynexport.exporter.reference import Answer, Case, Oracle
from dynexport.exporter.reference.dequantised import stored_weights
from dynexport.exporter.reference.half_caches import HalfEntries
from dynexport.exporter.reference.hugging_face import FloatArray
from dynexport.exporter.reference.int8_caches import RoundedEntries, Scales, read_scales
from dynexport.exporter.reference.rounding import attends_to_stored, has_rounded_caches
from dynexport.exporter.reference.seen_entries import ALONE, IntArray, SeenEntries
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.execution.batch import CHUNK


def rounded_weights(weights: Weights, folder: Path, manifest: Manifest) -> Weights:
    """Return a checkpoint's model with the weights that the bundle in ``folder`` holds.

    Raises:
        DynexportError: as for ``DequantisedWeights``.
    """
    stored = stored_weights(folder, manifest)
    return weights if stored is None else weights.rounded(stored)


def rounded_oracle(weights: Weights, folder: Path, manifest: Manifest) -> Oracle:
    """Return the strategy's model on rounded weights, which rounds its keys and values as the bundle does.

    Args:
        weights: the model with the bundle's weights, of ``rounded_weights``.
        folder: the bundle's directory; its manifest file is not read.
        manifest: its manifest.

    Raises:
        DynexportError: as for ``Scales.read``.
    """
    if has_rounded_caches(manifest):
        return _RoundingOracle(weights, read_scales(folder, manifest), manifest)
    return strategies()[manifest.contract.strategy].oracle(weights, manifest)


@dataclass(frozen=True)
class _RoundingOracle(Oracle):
    """A model that rounds its own keys and values: to int8 with scales, to float16 without."""

    weights: Weights
    scales: Scales | None
    manifest: Manifest

    @property
    def loaded_by(self) -> str:  # type: ignore[override]
        return self.weights.loaded_by

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        return self._of(cases).answers(cases, at=at)

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        return self._of(cases).hidden_states(cases)

    def _of(self, cases: Sequence[Case]) -> Oracle:
        entries: SeenEntries
        if self.scales is None:
            entries = HalfEntries([len(case.tokens) for case in cases])
        else:
            entries = RoundedEntries(self.scales, [_calls(case, self.manifest) for case in cases])
        return strategies()[self.manifest.contract.strategy].oracle(self.weights.with_entries(entries), self.manifest)


def _calls(case: Case, manifest: Manifest) -> IntArray:
    """Return the number of the call that each token of a case runs in, int64 [tokens], for cases that run alone.

    Of one whose tokens attend to stored entries only, it is ``ALONE``.
    """
    found = np.full(len(case.tokens), ALONE)
    if attends_to_stored(manifest):
        return found
    chunk = None if manifest.limits.whole_prompts else CHUNK
    for start, stop in case.prompted:
        size = chunk or max(1, stop - start)
        for first in range(start, stop, size):
            last = min(stop, first + size)
            if last - first > 1:
                found[first:last] = first
    return found


__all__ = ["rounded_oracle", "rounded_weights"]
