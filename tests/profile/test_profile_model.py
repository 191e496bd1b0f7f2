"""Figures against numpy, and which layers a budget skips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dynexport.exporter.profile import Measured, layers_to_skip, summarise
from dynexport.exporter.profile.model import Spread
from dynexport.runtime.bundle.errors import DynexportError

MakeMeasured = Callable[..., Measured]


def percentiles(values: np.ndarray) -> Spread:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return Spread(p10=p10, median=median, p90=p90)


def test_figures_are_those_of_numpy(make_measured: MakeMeasured) -> None:
    measured = make_measured()
    done = summarise(measured)
    assert (done.tokens, done.window, len(done.layers)) == (40, 16, 5)
    for index, layer in enumerate(done.layers):
        assert layer.layer == index
        for name, ratios in measured.blocks.items():
            assert layer.blocks[name].of_input == percentiles(ratios.of_input[index])
            assert layer.blocks[name].of_output == percentiles(ratios.of_output[index])
        assert layer.whole.of_input == percentiles(measured.layer.of_input[index])
        assert layer.whole.of_output.median == np.median(measured.layer.of_output[index])
        assert layer.influence == pytest.approx(measured.influence[index].mean())
    attention, mlp = measured.blocks["attention"], measured.blocks["mlp"]
    assert done.blocks["mlp"].of_output == percentiles(mlp.of_output)
    assert done.all_layers.of_output == percentiles(measured.layer.of_output)
    both = np.concatenate([attention.of_input, mlp.of_input])
    assert done.all_blocks.of_input == percentiles(both)
    for threshold, share in zip(done.sparsity.thresholds, done.sparsity.of_input, strict=True):
        assert share == (both < threshold).mean()
    assert done.sparsity.thresholds[::10] == (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
    assert list(done.sparsity.of_output) == sorted(done.sparsity.of_output)


def test_a_parallel_layer_is_one_block(make_measured: MakeMeasured) -> None:
    done = summarise(make_measured(blocks=["attention + mlp"]))
    assert list(done.blocks) == ["attention + mlp"]
    assert done.all_blocks == done.blocks["attention + mlp"]


def test_layers_of_the_least_influence_go_first(make_measured: MakeMeasured) -> None:
    influence = np.array([0.9, 0.2, 0.1, 0.2, 0.5])
    done = summarise(replace(make_measured(), influence=np.repeat(influence[:, None], 40, 1)))
    assert [layer.skip_order for layer in done.layers] == [4, 1, 0, 2, 3]
    assert [done.least(count) for count in range(4)] == [(), (2,), (1, 2), (1, 2, 3)]


@pytest.mark.parametrize(
    ("layers", "skip", "budget", "count"),
    [
        (30, 0, None, 0),
        (30, 29, None, 29),
        (30, None, 0.5, 15),
        (30, None, 1, 0),
        (30, None, 1 / 30, 29),
        (100, None, 0.29, 71),
        (7, None, 0.5, 4),
    ],
)
def test_budgets(layers: int, skip: int | None, budget: float | None, count: int) -> None:
    assert layers_to_skip(layers, skip=skip, budget=budget) == count


@pytest.mark.parametrize(
    ("skip", "budget", "expected"),
    [
        (4, None, r"skip: expected 0\.\.3 of 4 layers, found 4"),
        (-1, None, r"skip: expected 0\.\.3 of 4 layers, found -1"),
        (None, 0.0, "budget: expected a share of the layers, over 0 and up to 1, found 0"),
        (None, 1.5, "found 1.5"),
        (None, float("nan"), "found nan"),
        (None, None, "found None"),
        (None, 0.2, "budget: expected at least 1 of 4 layers to stay, found 0.2 of them"),
    ],
)
def test_budgets_that_leave_nothing(skip: int | None, budget: float | None, expected: str) -> None:
    with pytest.raises(DynexportError, match=expected):
        layers_to_skip(4, skip=skip, budget=budget)
