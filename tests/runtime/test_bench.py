"""The benchmark's report: its keys, its ideal counted again from the checkpoint's bytes, and shares that add up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from bundles import CONFORMANCE
from safetensors.numpy import load_file

from dynexport.exporter.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bench import Benchmark, benchmark

PROMPT, NEW, BATCH = 12, 4, 3
KEPT = (0, 2, 4, 7)


@pytest.fixture(scope="module")
def measured(bundle: Bundle) -> Benchmark:
    return benchmark(bundle, prompt_tokens=PROMPT, new_tokens=NEW, batch=BATCH, repeats=2, threads=1)


def bytes_of_a_step(layers: tuple[int, ...]) -> int:
    """What a decode step has to read: the kept layers, the final norm and the head, and the caches of the kept."""
    tensors = load_file(CONFORMANCE / "skip-2x" / "model.safetensors")
    kept = tuple(f"model.layers.{layer}." for layer in layers)
    weights = sum(
        value.nbytes for name, value in tensors.items() if name.startswith((*kept, "lm_head.", "model.norm."))
    )
    key_and_value = 2 * 2 * 8 * 4  # two heads of 8 numbers
    return weights + BATCH * (PROMPT + NEW // 2) * len(layers) * key_and_value


def test_the_keys_of_the_report(measured: Benchmark) -> None:
    report = measured.model_dump(mode="json")
    assert [result["name"] for result in report["results"]] == ["dense", "2"]
    figures = {"prefill_tokens_per_second", "decode_milliseconds", "speedup", "ideal_speedup", "efficiency"}
    for result in report["results"]:
        assert figures <= result.keys()
        assert all(math.isfinite(result[figure]) and result[figure] > 0 for figure in figures)
    assert (report["batch"], report["prompt_tokens"], report["new_tokens"], report["threads"]) == (3, 12, 4, 1)
    assert {"cpu", "cores", "onnxruntime"} <= report["machine"].keys()


def test_the_ideal_is_the_ratio_of_the_bytes(measured: Benchmark) -> None:
    dense, skipped = measured.results
    ideal = bytes_of_a_step(tuple(range(8))) / bytes_of_a_step(KEPT)
    assert skipped.ideal_speedup == pytest.approx(ideal, rel=1e-9)
    assert skipped.efficiency == pytest.approx(skipped.speedup / ideal)
    read = bytes_of_a_step(KEPT) / (skipped.decode_milliseconds / 1e3) / 1e9
    assert skipped.gigabytes_per_second == pytest.approx(read)
    assert (dense.speedup, dense.ideal_speedup, dense.efficiency, dense.layers) == (1, 1, 1, 8)


def test_the_shares_add_up(measured: Benchmark) -> None:
    assert sum(measured.operators.values()) == pytest.approx(1)
    assert 0 < measured.engine_share <= 1
    assert "GroupQueryAttention" in measured.operators and "If" not in measured.operators
    assert list(measured.operators.values()) == sorted(measured.operators.values(), reverse=True)


def test_full_depth_is_not_measured_twice(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "b", speedups=[1, 2], golden=False, static=True)
    bundle = Bundle.open(tmp_path / "b")
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1}
    assert [result.name for result in benchmark(bundle, **sizes).results] == ["dense", "2"]
    assert [result.name for result in benchmark(bundle, speedup=1, **sizes).results] == ["dense"]


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "repeats"])
def test_sizes_are_at_least_one(bundle: Bundle, name: str) -> None:
    with pytest.raises(DynexportError, match=f"^{name}: expected at least 1, found 0"):
        benchmark(bundle, **{"threads": 1, name: 0})


def test_lengths_that_do_not_fit_the_context(bundle: Bundle) -> None:
    with pytest.raises(DynexportError, match=r"prompt_tokens \+ new_tokens: expected at most 253 .* found 254"):
        benchmark(bundle, prompt_tokens=250, new_tokens=4, threads=1)
