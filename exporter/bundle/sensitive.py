"""Choose the matrices that stay in 8 bits among 4-bit ones: those whose products on a text would lose most."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from dynexport.exporter.bundle.calibrated import Calibrated
from dynexport.exporter.bundle.weights import LAYERS, WeightReader
from dynexport.exporter.lowering.onnxruntime import Kept
from dynexport.exporter.quantise.sensitivity import lost_products

_NAME = re.compile(r"\.(?P<layer>[0-9]+)\.(?:.*\.)?(?P<matrix>[^.]+)\.weight$")


@dataclass(frozen=True)
class Sensitive:
    """The matrices that stay in 8 bits.

    Attributes:
        kept: their rows, for the target.
        note: which ones they are, in one line.
    """

    kept: Kept
    note: str


@dataclass(frozen=True)
class _Part:
    """Rows of a weight of the graph that are one matrix of the checkpoint.

    Attributes:
        weight: name of the graph's weight.
        name: name of the checkpoint's matrix.
        rows: number of rows.
        values: number of values.
        loss: share of the squared products that 4 bits lose.
    """

    weight: str
    name: str
    rows: int
    values: int
    loss: float


def choose_sensitive(calibrated: Calibrated, reader: WeightReader, share: float) -> Sensitive:
    """Keep the matrices with the largest relative errors of products, as many as a share of the layers' weights allows.

    Queries, keys and values are matrices of their own, also where they are one weight of the graph.

    Args:
        calibrated: knows the inputs of the projections.
        reader: reads the checkpoint's weights.
        share: the largest share, above 0.
    """
    parts = list(_parts(calibrated, reader))
    left, chosen = share * sum(part.values for part in parts), set[str]()
    for part in sorted(parts, key=lambda part: -part.loss):
        if part.values <= left:
            chosen.add(part.name)
            left -= part.values
    kept = {
        weight: _joined([(part.rows, part.name in chosen) for part in group])
        for weight, group in ((name, list(found)) for name, found in groupby(parts, lambda part: part.weight))
        if any(part.name in chosen for part in group)
    }
    return Sensitive(kept, _note(parts, chosen))


def _parts(calibrated: Calibrated, reader: WeightReader) -> Iterator[_Part]:
    for weight, (shape, size) in calibrated.projections.items():
        if not weight.startswith(LAYERS):
            continue
        lost, whole = lost_products(reader.read(weight, shape), calibrated.moments(weight, shape[1]), size)
        start = 0
        for name, rows in reader.parts(weight, shape):
            own = slice(start, start + rows)
            products = float(whole[own].sum())
            yield _Part(weight, name, rows, rows * shape[1], float(lost[own].sum()) / products if products else 0.0)
            start += rows


def _joined(rows: Sequence[tuple[int, bool]]) -> list[tuple[int, bool]]:
    """Join neighbours that are stored alike."""
    return [(sum(count for count, _ in group), kept) for kept, group in groupby(rows, lambda row: row[1])]


def _note(parts: Sequence[_Part], chosen: set[str]) -> str:
    layers: dict[str, list[int]] = {}
    for part in parts:
        found = _NAME.search(part.name)
        if part.name in chosen and found is not None:
            layers.setdefault(found["matrix"], []).append(int(found["layer"]))
    values = sum(part.values for part in parts if part.name in chosen)
    share = values / max(1, sum(part.values for part in parts))
    named = "; ".join(f"{matrix} of layers {_ranges(sorted(numbers))}" for matrix, numbers in layers.items())
    size = f"{len(chosen)} of {len(parts)} matrices stay in 8 bits, {share:.1%} of the layers' weights"
    return f"sensitive: {size}: {named or 'none, as each has more'}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text: 0-2, 5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


__all__ = ["Sensitive", "choose_sensitive"]
