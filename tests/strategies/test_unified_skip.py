"""The kept sets of Unified Skip against the routing contract's formulas, written down once more."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from hypothesis import given, settings
from hypothesis import strategies as st

from dynexport.exporter.bundle.contract import read_contract
from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies import strategies
from dynexport.exporter.strategies.unified_skip import kept_by_order, kept_layers
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor

RULES = ("official", "balanced", "modulo")


def official(layers: int, ratio: float) -> set[int]:
    keep = {0, layers - 1}
    n = int(layers / ratio)
    g = int(layers / (n - 1))
    for i in range(1, layers - 1):
        if i % g == 0 and len(keep) < n:
            keep.add(i)
    return keep


def balanced(layers: int, ratio: float) -> set[int]:
    n = max(2, int(layers / ratio))
    return {round(j * (layers - 1) / (n - 1)) for j in range(n)}


def modulo(layers: int, ratio: float) -> set[int]:
    n = int(layers / ratio)
    lowest_first = [i for i in range(layers - 1) if i % ratio == 0]
    return {*lowest_first[: n - 1], layers - 1}


FORMULAS: dict[str, Callable[[int, float], set[int]]] = {
    "official": official,
    "balanced": balanced,
    "modulo": modulo,
}


@st.composite
def targets(draw: st.DrawFn) -> tuple[str, int, float]:
    """A rule, a number of layers, and a ratio that leaves at least two of them."""
    rule = draw(st.sampled_from(RULES))
    layers = draw(st.integers(4, 200))
    whole = st.integers(2, layers // 2)
    ratio = draw(whole if rule == "modulo" else whole | st.floats(1, layers / 2, exclude_min=True))
    return rule, layers, float(ratio)


@settings(deadline=None)
@given(targets())
def test_the_formulas(target: tuple[str, int, float]) -> None:
    rule, layers, ratio = target
    keep = kept_layers(rule, ratio, layers)
    assert list(keep) == sorted(FORMULAS[rule](layers, ratio))
    assert list(keep) == sorted(set(keep))
    assert 0 in keep and layers - 1 in keep
    assert 2 <= len(keep) <= max(2, int(layers / ratio))


@pytest.mark.parametrize("rule", ["official", "balanced"])
def test_whole_ratios_keep_exactly_their_share(rule: str) -> None:
    for layers in range(4, 129):
        for ratio in range(2, layers // 2 + 1):
            assert len(kept_layers(rule, float(ratio), layers)) == layers // ratio, (layers, ratio)


@pytest.mark.parametrize("rule", RULES)
def test_a_ratio_of_one_keeps_everything(rule: str) -> None:
    assert kept_layers(rule, 1.0, 7) == tuple(range(7))


@pytest.mark.parametrize(
    ("rule", "ratio", "expected"),
    [
        ("official", 2, (*range(0, 27, 2), 29)),
        ("official", 3, (*range(0, 25, 3), 29)),
        ("official", 5, (0, 6, 12, 18, 24, 29)),
        ("official", 1.5, (*range(19), 29)),
        ("balanced", 5, (0, 6, 12, 17, 23, 29)),
        ("balanced", 20, (0, 29)),
        ("modulo", 5, (0, 5, 10, 15, 20, 29)),
        ("modulo", 4, (0, 4, 8, 12, 16, 20, 29)),
    ],
)
def test_thirty_layers(rule: str, ratio: float, expected: tuple[int, ...]) -> None:
    assert kept_layers(rule, float(ratio), 30) == expected


def speedups(layers: int, **fields: Any) -> tuple[Depth, ...]:
    """As a conversion finds them: contract fields, then the strategy."""
    strategy = strategies()["unified-skip"]
    contract = parse_contract({"strategy": "unified-skip", **fields}, "config.json: dynexport")
    return strategy.depths(contract, layers)


def test_names_and_order() -> None:
    assert [(s.name, s.ratio, s.keep) for s in speedups(4, speedups=[2, 1.25, 1])] == [
        ("2", 2.0, (0, 3)),
        ("1.25", 1.25, (0, 2, 3)),
        ("1", 1.0, (0, 1, 2, 3)),
    ]


def test_near_ratios_have_names_of_their_own() -> None:
    """They name files too: "2" twice would have written one graph over the other."""
    names = [speedup.name for speedup in speedups(8, speedups=[2, 2.0000001, 1.9999999])]
    assert len(set(names)) == 3


def test_keep_overrides_the_rule() -> None:
    [speedup] = speedups(6, keep=[4, 1, 4], speedups=[2, 3], rule="modulo")
    assert (speedup.name, speedup.ratio, speedup.keep) == ("keep", None, (1, 4))


@settings(deadline=None)
@given(st.integers(2, 64).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(1, n))))
def test_an_order_leaves_its_first_layers_out(drawn: tuple[list[int], int]) -> None:
    """The ratio N / n keeps n layers for every N and n, those that the order has last."""
    order, count = drawn
    keep = kept_by_order(order, len(order) / count, len(order))
    assert list(keep) == sorted(order[len(order) - count :])


def test_an_order_overrides_the_rule() -> None:
    found = [depth.keep for depth in speedups(6, order=[4, 1], speedups=[6 / 5, 1.5, 1], rule="modulo")]
    assert found == [(0, 1, 2, 3, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)]


def test_a_rule_of_the_user_replaces_a_checkpoint_s_order(saved_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved_model("mistral"))
    checkpoint.config["dynexport"] = {"strategy": "unified-skip", "order": [1]}
    assert read_contract(checkpoint).order == (1,)
    assert read_contract(checkpoint, rule="balanced").order is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speedups": [0]}, "expected finite ratios >= 1, found 0"),
        ({"speedups": [-2]}, "expected finite ratios >= 1, found -2"),
        ({"speedups": [0.99]}, "found 0.99"),
        ({"speedups": [math.nan]}, "found nan"),
        ({"speedups": [2, math.inf]}, "found inf"),
        ({"speedups": []}, "expected at least one ratio"),
        ({"speedups": ["fast"]}, "speedups.*'fast'"),
        ({"speedups": 2}, "speedups"),
        ({"speedups": [1e9]}, "speedup 1e[+]09: expected a ratio that keeps at least 2 of 6 layers"),
        ({"speedups": [1e9], "rule": "balanced"}, "speedup 1e[+]09"),
        ({"speedups": [1e9], "rule": "modulo"}, "speedup 1e[+]09"),
        ({"speedups": [4]}, "speedup 4: .* found one that keeps 1"),
        ({"speedups": [2.5], "rule": "modulo"}, "speedup 2.5: expected an integer"),
        ({"rule": "random"}, "rule.*'random'"),
        ({"keep": []}, "keep: expected at least one layer"),
        ({"keep": [0, 6]}, r"keep: expected layers 0\.\.5, found 6"),
        ({"keep": [-1]}, r"keep: expected layers 0\.\.5, found -1"),
        ({"keep": [1.5]}, "keep"),
        ({"kept": [1]}, "kept"),
        ({"order": [0, 6]}, r"order: expected layers 0\.\.5, found 6"),
        ({"order": [1, 2, 1]}, "order: expected every layer once, found"),
        ({"order": [1, 2]}, "speedup 2: expected an order of at least 3 layers, all but one at most, found 2"),
        ({"order": list(range(6)), "speedups": [1e9]}, "expected an order of at least 6 layers, all but one at most"),
    ],
)
def test_what_cannot_be_met_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DynexportError, match=message) as caught:
        speedups(6, **fields)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["speedups", "rule", "order", "keep", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(RULES),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
    )
)
def test_any_fields_are_met_or_refused(fields: dict[str, Any]) -> None:
    try:
        found = speedups(6, **fields)
    except DynexportError as error:
        assert "\n" not in str(error)
    else:
        assert all(set(speedup.keep) <= set(range(6)) for speedup in found)


@pytest.mark.parametrize("static", [False, True])
def test_graphs_of_a_bundle(static: bool, saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    done = convert(
        saved_model("mistral"),
        tmp_path / "bundle",
        strategy="unified-skip",
        speedups=(2.0, 1.25),
        static=static,
        golden=False,
    )
    graphs = [(graph.name, graph.layers, graph.takes("layer_active")) for graph in done.manifest.graphs]
    everything = (0, 1, 2, 3)
    decode = [("decode-2", (0, 3), False), ("decode-1.25", (0, 2, 3), False)]
    assert graphs == [("model", everything, not static)] + (decode if static else [])
    files = {path.name for path in done.output.iterdir()}
    assert {f"{name}.onnx" for name, _, _ in graphs} == {name for name in files if name.endswith(".onnx")}


def test_graphs_of_kept_layers_take_turns_as_conditions_do(tmp_path: Path) -> None:
    """Three depths in one conversation: what layers that are skipped together share holds for all of them."""
    ratios, found = (2.0, 1.25, 2.0, 1.0, 1.25), []
    for options in ({}, {"static": True}, {"target": "tensorrt"}):
        bundle = tmp_path / str(len(found))
        convert(CONFORMANCE / "skip-2x", bundle, speedups=(2.0, 1.25), golden=False, **options)
        executor = Executor(Bundle.open(bundle), threads=1)
        cache = executor.full_cache(2, 32)
        rows = executor.prefill(cache, [[5, 3, 8, 2], [7]], all_logits=True)
        logits = [np.concatenate(rows)]
        for token, ratio in enumerate(ratios):
            logits.append(executor.step(cache, [token + 11, token + 40], executor.bundle.depth(ratio)))
        rows = executor.prefill(cache, [[9], [4, 6, 1]], all_logits=True)
        found.append(np.concatenate([*logits, *rows]))
        assert len({tuple(lengths) for lengths in cache.lengths.tolist()}) == 3
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < 1e-4


def test_dense_has_nothing_to_skip(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match="--static: expected with --strategy unified-skip"):
        convert(saved_model("llama"), tmp_path / "bundle", strategy="dense", static=True)
