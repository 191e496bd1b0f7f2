"""Radial Networks in one graph: the reference's paths and logits where there is room, and who is turned away."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE, change_manifest, copied, dynexport, error_of, talking_checkpoint
from test_radial_parity import MARGIN, REFUSED
from tiny_models import EXEMPLARS, LAYERS, random_rows, save_radial_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.exporter.strategies.radial import single
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.execution.decisions import TURNED_AWAY
from dynexport.runtime.execution.executor import Executor

ModelOf = Callable[[str], Path]
Opened = tuple[Executor, RadialReference]
STEPS = 3


def opened(model: Path, bundle: Path, layer_capacity: float = 1.0) -> Opened:
    """The single graph of a model, and the reference."""
    convert(model, bundle, layer_capacity=layer_capacity, golden=False)
    executor = Executor(Bundle.open(bundle), 1)
    contract = executor.manifest.contract
    assert isinstance(contract, Radial)
    return executor, RadialReference.from_checkpoint(open_checkpoint(model), contract=contract)


@pytest.fixture(scope="module")
def half(saved_model: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Layers with room for half of the tokens; probabilities as gates."""
    home = tmp_path_factory.mktemp("half")
    model = save_radial_model(home / "model", saved_model("llama"), max_steps=STEPS, gate="probability")
    return opened(model, home / "bundle", 0.5)


@pytest.mark.parametrize("policy", ["step", "layer"])
@pytest.mark.parametrize("family", [family for family in EXEMPLARS if family not in REFUSED])
def test_paths_and_logits(family: str, policy: str, saved_model: ModelOf, tmp_path: Path) -> None:
    """A batch of lengths never used to build, steps of it, and another prompt in pieces, up to the last slot."""
    gate = "probability" if policy == "layer" else "none"
    fields = {"max_steps": 2, "cache_policy": policy, "gate": gate}
    executor, reference = opened(
        save_radial_model(tmp_path / "model", saved_model(family), **fields), tmp_path / "bundle"
    )
    rows, later = random_rows(1, 5, 17), random_rows(4, 4, 4, seed=9)
    cache = executor.full_cache(3, 24, record=True)
    found = [[logits] for logits in executor.prefill(cache, rows, all_logits=True)]
    for tokens in random_rows(3, 3, 3, seed=8):
        for row, logits in enumerate(executor.step(cache, tokens, executor.bundle.depth(1))):
            found[row].append(logits[None])
            rows[row] = [*rows[row], tokens[row]]
    for row, logits in enumerate(executor.prefill(cache, later, chunk=3, all_logits=True)):
        found[row].append(logits)
        rows[row] = [*rows[row], *later[row]]
    expected, paths = reference.routed_logits(rows)
    for row, (logits, path) in enumerate(zip(expected, paths, strict=True)):
        ours = executor.reader.joined(cache.logs[row]).choices
        assert ((ours == path.path).all(axis=0) | (path.margin.min(axis=0) < MARGIN)).all()
        assert np.abs(np.concatenate(found[row]) - logits).max() < 1e-4 * max(1, logits.std(axis=-1).mean())
        assert cache.lengths[:, row].sum() == path.depth.sum()
    assert len({tuple(column) for path in paths for column in path.path.T}) > 1 and not cache.overflow.any()


def test_what_is_logged_is_what_the_graph_set_logs(saved_model: ModelOf, tmp_path: Path) -> None:
    """Own routers, no reuse, no exit before the second step: with paths that end as nothing is left."""
    fields = {"max_steps": 6, "min_steps": 2, "allow_reuse": False, "gate": "probability"}
    model = save_radial_model(tmp_path / "model", saved_model("llama"), **fields)
    logs = []
    for name, capacity in (("set", None), ("single", 1.0)):
        convert(model, tmp_path / name, layer_capacity=capacity, golden=False)
        executor = Executor(Bundle.open(tmp_path / name), 1)
        cache = executor.full_cache(2, 12, record=True)
        executor.prefill(cache, random_rows(7, 3))
        executor.step(cache, [5, 6], executor.bundle.depth(1), np.array([True, False]))
        logs.append(([executor.reader.joined(log) for log in cache.logs], cache.lengths))
    for ours, theirs in zip(logs[0][0], logs[1][0], strict=True):
        for part in ("ran", "choices", "scores", "margins", "overflow"):
            one, other = getattr(ours, part), getattr(theirs, part)
            assert one.dtype == other.dtype and np.allclose(one, other, atol=1e-4), part
    assert (logs[0][1] == logs[1][1]).all()


def test_single_steps_and_batches_change_nothing(half: Opened, saved_model: ModelOf, tmp_path: Path) -> None:
    """With room for all; a row that has ended leaves nothing and is not in the way."""
    executor, _ = opened(
        save_radial_model(tmp_path / "model", saved_model("qwen2"), max_steps=STEPS), tmp_path / "bundle"
    )
    rows, full = random_rows(9, 4), executor.bundle.depth(1)
    cache = executor.full_cache(2, 9)
    at_once = executor.prefill(cache, rows, all_logits=True)
    alone = executor.prefill(executor.full_cache(1, 9), rows[:1], all_logits=True)[0]
    stepped = executor.full_cache(2, 9)
    live = np.array([True, True])
    for place in range(9):
        live[1] = place < 4
        logits = executor.step(stepped, [row[min(place, len(row) - 1)] for row in rows], full, live)
        assert all(np.abs(logits[row] - at_once[row][place]).max() < 1e-4 for row in np.flatnonzero(live))
    assert np.abs(alone - at_once[0]).max() < 1e-4
    assert (stepped.lengths == cache.lengths).all() and stepped.positions.tolist() == [9, 4]


# Below full capacity.


def expected_paths(forced: np.ndarray, counts: np.ndarray, room: int) -> np.ndarray:
    """Who runs where, token by token in line."""
    path = np.full_like(forced, -1)
    alive = np.arange(forced.shape[2]) < counts[:, None]
    for step, wishes in enumerate(forced):
        taken: collections.Counter[int] = collections.Counter()
        for row, token in np.argwhere(alive):
            layer = int(wishes[row, token])
            taken[layer] += 1
            path[step, row, token] = TURNED_AWAY if layer < LAYERS and taken[layer] > room else layer
        alive &= wishes < LAYERS
    return path


def test_who_is_turned_away(half: Opened) -> None:
    """Against a count of our own, in a padded batch: paths, overflow, and entries of those that ran."""
    executor, _ = half
    rows, turned_away = random_rows(6, 11, seed=1), 0
    for seed in range(4):
        random = np.random.default_rng(seed)
        forced = random.choice([0, 1, 2, 3, 4], (STEPS, 2, 11), p=[0.7, 0.1, 0.05, 0.05, 0.1])
        expected = expected_paths(forced, np.array([6, 11]), 11)
        cache = executor.full_cache(2, 11, record=True)
        executor.prefill(cache, rows, forced=[forced[:, 0, :6], forced[:, 1]])
        for row, length in enumerate((6, 11)):
            assert (cache.logs[row][0].choices == expected[:, row, :length]).all()
        ran = (expected >= 0) & (expected < LAYERS)
        assert (cache.lengths == ran.sum(axis=2)).all()
        assert (cache.overflow[0] == (expected == TURNED_AWAY).sum(axis=(0, 2))).all()
        turned_away += int(cache.overflow.sum())
    assert turned_away > 0


def test_a_token_that_is_turned_away_stays_as_it_is(half: Opened) -> None:
    """All want one layer in every step: the second half never runs, which is to leave at once."""
    executor, reference = half
    (row,) = random_rows(10)
    cache = executor.full_cache(1, 10)
    (logits,) = executor.prefill(cache, [row], all_logits=True, forced=[np.full((STEPS, 10), 2)])
    alike = np.full((STEPS, 10), 2)
    alike[:, 5:] = np.array([LAYERS, -1, -1])[:, None]
    (expected,), _ = reference.routed_logits([row], [alike])
    assert np.abs(logits - expected).max() < 1e-4
    assert cache.overflow.tolist() == [[5 * STEPS]] and (cache.lengths == 5).all()


def test_paths_that_are_spread_find_room(half: Opened) -> None:
    executor, reference = half
    (row,) = random_rows(12)
    path = (np.arange(12)[None] + np.arange(STEPS)[:, None]) % 2
    cache = executor.full_cache(1, 12, record=True)
    (logits,) = executor.prefill(cache, [row], all_logits=True, forced=[path])
    (expected,), _ = reference.routed_logits([row], [path])
    assert not cache.overflow.any() and (cache.logs[0][0].choices == path).all()
    assert np.abs(logits - expected).max() < 1e-4


def test_a_token_alone_always_has_room(half: Opened) -> None:
    executor, _ = half
    cache = executor.full_cache(1, 8)
    for token in random_rows(8)[0]:
        executor.step(cache, [token], executor.bundle.depth(1))
    assert not cache.overflow.any()


# The graph.


def test_no_condition_and_every_weight_once(half: Opened) -> None:
    executor, _ = half
    path = executor.bundle.path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert not {*kinds} & {"If", "Loop", "Scan", "NonZero", "Unique", "Compress"}
    assert kinds["GroupQueryAttention"] == STEPS
    weights = [tensor.name for tensor in model.graph.initializer if tensor.external_data]
    assert len({*weights}) == len(weights)
    offsets = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "offset"
    }
    assert len(offsets) == len(weights)
    names = [node.name for node in model.graph.node]
    assert len({*names}) == len(names)


@pytest.mark.parametrize(
    ("spoiled", "expected"),
    [
        (lambda op, share, rounding, tokens: op.Add(op.Mul(tokens, 0), 7), "not among the contract"),
        (lambda op, share, rounding, tokens: op.Shape(op.NonZero(tokens), start=1, end=2), "NonZero"),
    ],
    ids=["a number of tokens", "a shape that depends on values"],
)
def test_a_spoiled_graph_is_refused(
    spoiled: object, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(single, "capacity", spoiled)
    with pytest.raises(BrokenGraph, match=expected):
        convert(CONFORMANCE / "radial-step", tmp_path / "b", fields={"max_steps": 1}, layer_capacity=1, golden=False)


# The command line.


def test_everything_that_serves_a_person(tmp_path: Path) -> None:
    source = talking_checkpoint(tmp_path / "model", "radial-layer")
    bundle, small = tmp_path / "bundle", ("--threads", 1, "--json", "-")
    steps = ("--set", "max_steps=2", "--set", "min_steps=0")
    ran = dynexport("convert", source, "--single-graph", *steps, "-o", bundle, "--json", "-")
    assert ran.code == 0 and ran.report["routing"]["layer_capacity"] == 1.0 and ran.report["limits"]["prompt"] == 64
    assert ran.report["golden_rows"] > 0
    assert "100 % of a call's tokens" in " ".join(dynexport("inspect", bundle).out.split())
    ran = dynexport("verify", bundle, "--new-tokens", 4, *small)
    assert ran.code == 0 and ran.report["route_agreement"] == 1, ran.err
    (tmp_path / "book.txt").write_text("Once upon a time the river rose. " * 5)
    ran = dynexport("eval", bundle, "--text", tmp_path / "book.txt", "--window", 24, "--prompt-tokens", 16, *small)
    assert 0 < ran.report["results"][0]["depth"] <= 2
    ran = dynexport("run", bundle, "--chat", "--max-new-tokens", 3, *small, stdin="hi\nyou\n")
    assert ran.code == 0 and len(ran.report["messages"]) == 4
    ran = dynexport("run", bundle, "--prompt", "hi", "--max-new-tokens", 4, "--trace", tmp_path / "trace.json", *small)
    assert ran.code == 0 and "turned_away" not in ran.report
    assert len(json.loads((tmp_path / "trace.json").read_text())["depth"]) == 5


def test_below_full_capacity_it_is_said(half: Opened, tmp_path: Path) -> None:
    bundle = half[0].bundle.path
    ran = dynexport("verify", bundle, "--against", bundle.parent / "model", "--new-tokens", 2, "--threads", 1)
    assert ran.code == 0 and "not exercised: other batches and other prefill chunks, as the tokens" in ran.out
    assert "--long goes there" not in ran.out
    ran = dynexport("run", bundle, "--ids", "1,1,1,1,1,1", "--max-new-tokens", 2, "--json", "-", "--threads", 1)
    assert ran.code == 0 and ran.report["turned_away"] > 0 and "tokens were turned away" in ran.err


REFUSED_OPTIONS: dict[str, tuple[str, list[object], str]] = {
    "capacity alone": ("radial-step", ["--layer-capacity", 0.5], "--layer-capacity: expected with --single-graph"),
    "no room": ("radial-step", ["--single-graph", "--layer-capacity", 0], "above 0 and up to 1, found 0"),
    "too much room": ("radial-step", ["--single-graph", "--layer-capacity", 1.5], "above 0 and up to 1, found 1.5"),
    "no number": ("radial-step", ["--single-graph", "--layer-capacity", "nan"], "above 0 and up to 1, found nan"),
    "mod": ("mod-router", ["--single-graph"], "--single-graph: expected a strategy that has such a graph, found mod"),
    "dense": ("dense", ["--single-graph"], "--single-graph: expected a strategy that has such a graph, found dense"),
    "both": ("radial-step", ["--single-graph", "--static"], "--static: expected without --single-graph"),
    "static": ("radial-step", ["--static"], "found radial; for a static graph of radial give --single-graph"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_refused_options(case: str, tmp_path: Path) -> None:
    source, options, expected = REFUSED_OPTIONS[case]
    ran = dynexport("convert", CONFORMANCE / source, *options, "-o", tmp_path / "bundle")
    assert expected in error_of(ran) and not (tmp_path / "bundle").exists()


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no room": (lambda m: m["routing"].update(layer_capacity=0), "routing.paths.layer_capacity"),
    "no number": (lambda m: m["routing"].update(layer_capacity="half"), "routing.paths.layer_capacity"),
    "no chunk": (lambda m: m["limits"].update(prompt=0), "limits.prompt"),
    "slack beyond memory": (lambda m: m["caches"][0].update(slack=2**31 - 1), "cache: 1 rows"),
    "slack beyond numbers": (lambda m: m["caches"][0].update(slack=2**70), "caches.0.slack"),
    "nothing of the router": (lambda m: m.update(routing=None), "caches: expected one for each of 4 layers, found 3"),
    "nothing of the input": (lambda m: m["graphs"][0]["inputs"].pop(), "found 'past_key_values."),
    "another graph": (lambda m: m["programs"][0].update(graph="step"), "programs: expected a graph of the manifest"),
    "fewer hops": (lambda m: m["routing"].update(hops=2), "caches: expected one for each of 2 hops, found 3"),
    "places of layers": (lambda m: m["routing"].update(places="layers"), "caches: expected one for each of 4 layers"),
    "no paths": (
        lambda m: m["graphs"][0].update(outputs=[o for o in m["graphs"][0]["outputs"] if o["name"] != "paths"]),
        "expected an output paths",
    ),
    "another size": (lambda m: m["model"].update(head_dim=16), "expected 2 heads of 16 as in model"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(case: str, half: Opened, tmp_path: Path) -> None:
    change, expected = HOSTILE[case]
    bundle = copied(half[0].bundle.path, tmp_path / "bundle")
    change_manifest(bundle, change)
    assert expected in error_of(dynexport("run", bundle, "--ids", "1,2", "--max-new-tokens", 2, "--threads", 1))


def test_a_missing_layer_is_refused_and_nothing_is_counted(half: Opened) -> None:
    executor, _ = half
    cache = executor.full_cache(1, 8, record=True)
    message = r"forced path: hop 1: expected a layer 0\.\.3, 4 to leave or -1, found 9"
    with pytest.raises(DynexportError, match=message):
        executor.prefill(cache, [[1, 2]], forced=[np.array([[0, 1], [1, 9], [2, 2]])], chunk=1)
    assert not cache.positions.any() and not cache.lengths.any() and not cache.logs[0]
