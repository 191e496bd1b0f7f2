"""Radial Networks: every family and both cache policies against the reference, forced paths, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, change_tensors, checkpoint, dynexport, error_of, talking_checkpoint
from tiny_models import EXEMPLARS, LAYERS, random_rows, save_radial_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.execution.executor import Executor

ModelOf = Callable[[str], Path]
MARGIN = 1e-5
# Layers of one pool share a cache, so that one window has to serve all.
REFUSED = ("gemma2",)


@pytest.mark.parametrize("policy", ["step", "layer"])
@pytest.mark.parametrize("family", [family for family in EXEMPLARS if family not in REFUSED])
def test_paths_and_logits(family: str, policy: str, saved_model: ModelOf, tmp_path: Path) -> None:
    """Prompts of lengths never used to build, as a batch, then steps of the batch."""
    gate = "probability" if policy == "layer" else "none"
    model = save_radial_model(tmp_path / "model", saved_model(family), cache_policy=policy, gate=gate)
    convert(model, tmp_path / "bundle", golden=False)
    bundle = Bundle.open(tmp_path / "bundle")
    contract = bundle.manifest.contract
    assert isinstance(contract, Radial)
    executor, rows = Executor(bundle, 1), random_rows(1, 5, 17)
    cache = executor.full_cache(3, 24, record=True)
    found = executor.prefill(cache, rows, all_logits=True)
    for tokens in random_rows(3, 3, seed=8):
        logits = executor.step(cache, tokens, bundle.depth(1))
        found = [np.concatenate([row, new[None]]) for row, new in zip(found, logits, strict=True)]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
    reference = RadialReference.from_checkpoint(open_checkpoint(model), contract=contract)
    expected, paths = reference.routed_logits(rows)
    for row, (logits, path) in enumerate(zip(expected, paths, strict=True)):
        ours = executor.reader.joined(cache.logs[row]).choices
        assert ((ours == path.path).all(axis=0) | (path.margin.min(axis=0) < MARGIN)).all()
        spread = logits.std(axis=-1).mean()
        assert np.abs(found[row] - logits).max() < 1e-4 * max(1, spread)
    assert len({tuple(column) for path in paths for column in path.path.T}) > 1


def test_the_sequential_model(saved_model: ModelOf, tmp_path: Path) -> None:
    """Every layer in order, by a forced path, is the dense model."""
    model = save_radial_model(tmp_path / "model", saved_model("llama"), max_steps=LAYERS)
    convert(model, tmp_path / "radial", golden=False)
    convert(model, tmp_path / "dense", strategy="dense", golden=False)
    (row,) = random_rows(9)
    path = np.repeat(np.arange(LAYERS)[:, None], len(row), axis=1)
    logits = []
    for name, forced in (("radial", [path]), ("dense", None)):
        executor = Executor(Bundle.open(tmp_path / name), 1)
        logits.append(executor.prefill(executor.full_cache(1, 9), [row], all_logits=True, forced=forced)[0])
    assert np.abs(logits[0] - logits[1]).max() < 1e-5


def test_a_missing_layer_is_refused_and_nothing_is_counted(tmp_path: Path) -> None:
    convert(CONFORMANCE / "radial-step", tmp_path / "bundle", golden=False)
    executor = Executor(Bundle.open(tmp_path / "bundle"), 1)
    cache = executor.full_cache(1, 8, record=True)
    path = np.array([[0, 1], [1, 9], [2, 2], [3, 3], [0, 0]])
    with pytest.raises(DynexportError, match=r"forced path: hop 1: expected a layer 0\.\.3, 4 to leave or -1, found 9"):
        executor.prefill(cache, [[1, 2]], forced=[path], chunk=1)  # the first piece is right
    assert not cache.positions.any() and not cache.lengths.any()
    assert not cache.logs[0]


def test_one_window_for_all(saved_model: ModelOf, tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match="radial: expected a pool of layers with one sliding window, found gemma2"):
        convert(save_radial_model(tmp_path / "model", saved_model("gemma2")), tmp_path / "bundle", golden=False)


def test_a_layer_that_is_come_back_to_grows_its_cache(saved_model: ModelOf, tmp_path: Path) -> None:
    """Five entries a token in one layer: prompt and steps are those of the reference."""
    model = save_radial_model(tmp_path / "model", saved_model("llama"), cache_policy="layer")
    convert(model, tmp_path / "bundle", golden=False)
    bundle = Bundle.open(tmp_path / "bundle")
    executor, (row,) = Executor(bundle, 1), random_rows(7)
    cache = executor.full_cache(1, 8)
    path = np.full((5, len(row)), 2)
    (logits,) = executor.prefill(cache, [row], all_logits=True, forced=[path])
    assert cache.lengths[2, 0] == 35 and isinstance(bundle.manifest.contract, Radial)
    reference = RadialReference.from_checkpoint(open_checkpoint(model), contract=bundle.manifest.contract)
    (expected,), _ = reference.routed_logits([row], [path])
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 2, "min_steps": 3}, "min_steps: expected at most max_steps = 2, found 3"),
        ({"router": {"hidden": 7, "shared": True}}, "radial_router.fc1.weight"),
        ({"exit": False}, "radial_router.fc2"),
        ({"steps": 3}, "steps"),
    ],
)
def test_bad_contracts(fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "radial-step")
    config = json.loads((source / "config.json").read_text())
    config["dynexport"] |= fields
    (source / "config.json").write_text(json.dumps(config))
    assert expected in error_of(dynexport("convert", source, "-o", tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_bad_tensors_and_bench_on_the_command_line(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "radial-step")
    assert "--static" in error_of(dynexport("convert", source, "--static", "-o", tmp_path / "bundle"))
    assert dynexport("convert", source, "--no-golden", "-o", tmp_path / "bundle").code == 0
    assert dynexport("convert", source, "--strategy", "dense", "--no-golden", "-o", tmp_path / "dense").code == 0
    shown = " ".join(dynexport("inspect", tmp_path / "bundle").out.replace("│", " ").split())
    assert "paths 5 hops through 4 layers; exit after 0 hops or later; a token may run a layer again" in shown
    assert "attention.onnx (called for the cache of every hop)" in shown and "decode any embedding, " in shown
    measured = dynexport(
        "bench",
        tmp_path / "bundle",
        *("--baseline", tmp_path / "dense", "--hops", 2, "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1),
    )
    assert measured.code == 0 and "hops 2" in measured.out
    for option, expected in (
        ("--hops", "hops: expected 1..5 for this"),
        ("--depth", "--hops N makes every token take a path"),
    ):
        assert expected in error_of(dynexport("bench", tmp_path / "bundle", "--prompt-tokens", 4, option, 6))
    change_tensors(source, lambda tensors: tensors.pop("model.radial_router.fc2.bias"))
    assert "radial_router.fc2.bias" in error_of(dynexport("convert", source, "-o", tmp_path / "other"))


def test_evaluation_and_chat(tmp_path: Path) -> None:
    """What serves a person: the realised depth beside the perplexity, a second turn, a picture."""
    talking_checkpoint(tmp_path / "model", "radial-layer")
    bundle = tmp_path / "bundle"
    convert(tmp_path / "model", bundle, golden=False)
    (tmp_path / "book.txt").write_text("Once upon a time the river rose. " * 20)
    sizes = ("--window", 64, "--prompt-tokens", 16, "--max-tokens", 128, "--threads", 1)
    ran = dynexport("eval", bundle, "--text", tmp_path / "book.txt", *sizes, "--json", "-")
    (result,) = ran.report["results"]
    assert result["name"] == "routed" and 0 < result["depth"] < 7
    ran = dynexport("run", bundle, "--chat", "--max-new-tokens", 4, "--threads", 1, "--json", "-", stdin="hi\nyou\n")
    assert ran.code == 0 and len(ran.report["messages"]) == 4
    traced = dynexport("run", bundle, "--prompt", "hi", "--max-new-tokens", 4, "--trace", tmp_path / "trace.json")
    assert traced.code == 0, traced.err
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert len(trace["depth"]) == 5 and all(0 <= depth <= 7 for depth in trace["depth"])
