"""The benchmark's report: its keys, its ideal counted again from the checkpoint's bytes, and shares that add up."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, checkpoint, copied
from safetensors.numpy import load_file

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.manifest import PathRouting
from dynexport.runtime.execution.decisions import TURNED_AWAY
from dynexport.runtime.measure import bandwidth
from dynexport.runtime.measure.bandwidth import ReadBandwidth
from dynexport.runtime.measure.bench import Benchmark, Workload, benchmark
from dynexport.runtime.measure.cost import path_bytes
from dynexport.runtime.measure.mode import Mode, is_steady, quartiles, result_of
from dynexport.runtime.measure.other_work import OtherWork
from dynexport.runtime.measure.timed_run import Sizes, Timed
from dynexport.runtime.measure.twin import Twin

PROMPT, NEW, BATCH = 12, 4, 3
KEPT = (0, 2, 4, 7)


def bench(bundle: Bundle, baseline: Bundle | None = None, **workload: Any) -> Benchmark:
    return benchmark(bundle, Workload(**{"threads": 1, **workload}), baseline=baseline)


@pytest.fixture(scope="module")
def measured(bundle: Bundle) -> Benchmark:
    return bench(bundle, prompt_tokens=PROMPT, new_tokens=NEW, batch=BATCH, repeats=2, threads=1)


def bytes_of_steps(layers: tuple[int, ...]) -> int:
    """What the decode steps have to read: the kept layers, the final norm and the head, and the caches of the kept."""
    tensors = load_file(CONFORMANCE / "skip-2x" / "model.safetensors")
    kept = tuple(f"model.layers.{layer}." for layer in layers)
    weights = sum(
        value.nbytes for name, value in tensors.items() if name.startswith((*kept, "lm_head.", "model.norm."))
    )
    key_and_value = 2 * 2 * 8 * 4  # two heads of 8 numbers
    # Three steps of warm-up are not measured; a token attends to itself too.
    entries = sum(PROMPT + step + 1 for step in range(3, 3 + NEW))
    return NEW * weights + BATCH * entries * len(layers) * key_and_value


def test_the_keys_of_the_report(measured: Benchmark) -> None:
    report = measured.model_dump(mode="json")
    assert [result["name"] for result in report["results"]] == ["full", "2"]
    figures = {"prefill_tokens_per_second", "decode_milliseconds", "speedup", "ideal_speedup", "efficiency"}
    for result in report["results"]:
        assert figures <= result.keys()
        assert all(math.isfinite(result[figure]) and result[figure] > 0 for figure in figures)
    assert (report["batch"], report["prompt_tokens"], report["new_tokens"], report["threads"]) == (3, 12, 4, 1)
    assert {"cpu", "cores", "onnxruntime"} <= report["machine"].keys()


def test_the_ideal_is_the_ratio_of_the_bytes(measured: Benchmark) -> None:
    dense, skipped = measured.results
    ideal = bytes_of_steps(tuple(range(8))) / bytes_of_steps(KEPT)
    assert skipped.ideal_speedup == pytest.approx(ideal, rel=1e-9)
    assert skipped.efficiency == pytest.approx(skipped.speedup / ideal)
    read = bytes_of_steps(KEPT) / NEW / (skipped.decode_milliseconds / 1e3) / 1e9
    assert skipped.gigabytes_per_second == pytest.approx(read)
    assert (skipped.prefill_speedup, skipped.prefill_ideal_speedup, skipped.layers) == (1, 1, 4)
    assert (dense.speedup, dense.ideal_speedup, dense.efficiency, dense.layers) == (1, 1, 1, 8)
    assert (dense.speedup_quartiles, dense.steady, skipped.steady) == ((1, 1), True, False)  # of two repetitions
    assert skipped.speedup_quartiles[0] <= skipped.speedup <= skipped.speedup_quartiles[1]


def test_what_a_step_reads_is_set_against_the_memory(measured: Benchmark) -> None:
    cache = measured.last_level_cache
    for result, layers in zip(measured.results, (tuple(range(8)), KEPT), strict=True):
        assert result.bytes_per_step == bytes_of_steps(layers) / NEW
        read = result.bandwidth_gigabytes_per_second * 1e9 * result.ideal_milliseconds / 1e3
        assert read == pytest.approx(result.bytes_per_step)
        assert result.fits_cache is (None if cache is None else result.bytes_per_step <= cache)
        assert 0 <= result.others_share <= 1
    assert 0 <= measured.others_share <= 1
    assert measured.spinning == {measured.bundle: True}


def timed(prefill: float | None, steps: list[float], read: int, others: float | None = 0.0) -> Timed:
    return Timed(
        prefill_seconds=prefill,
        step_seconds=steps,
        processor_seconds=4.0,
        others_seconds=others,
        bytes=read,
        flops=10,
        layers=1,
        turned_away=0,
    )


def test_medians_least_and_spread_are_those_of_the_steps() -> None:
    full = Mode("full", lambda: timed(0, [], 0))
    full.timed = [timed(0.4, [0.004, 0.002, 0.003], 300), timed(0.2, [0.008, 0.005, 0.006], 300)]
    half = Mode("half", full.run, bandwidths=[30e3, 50e3, 40e3])
    half.timed = [timed(None, [0.001, 0.002, 0.003], 150, 1.0), timed(None, [0.003, 0.003, 0.002], 150, 0.2)]
    sizes = Sizes(rows=2, prompt_tokens=3, steps=3, threads=1, backend="onnxruntime")
    found = result_of(half, full, sizes, cache=50)
    assert (found.decode_milliseconds, found.decode_least_milliseconds) == pytest.approx((2.5, 1))
    assert found.decode_quartiles_milliseconds == pytest.approx((2, 3))
    assert (found.prefill_milliseconds, found.prefill_least_milliseconds) == pytest.approx((300, 200))
    assert found.prefill_quartiles_milliseconds == pytest.approx((250, 350))
    assert found.speedup == pytest.approx((3 / 2 + 6 / 3) / 2) and found.ideal_speedup == 2
    assert (found.bytes_per_step, found.fits_cache) == (50, True)
    assert found.bandwidth_gigabytes_per_second == pytest.approx(40e3 / 1e9)
    assert found.ideal_milliseconds == pytest.approx(1e3 * 50 / 40e3)
    assert found.others_share == pytest.approx(1.2 / 8)
    assert result_of(full, full, sizes, cache=50).fits_cache is False
    unknown = result_of(full, full, sizes, cache=None)
    assert (unknown.fits_cache, unknown.ideal_milliseconds) == (None, None)
    half.timed[0].others_seconds = None
    assert result_of(half, full, sizes, cache=None).others_share is None


def test_other_work_is_what_the_own_processes_did_not_do() -> None:
    """A busy child is other work, unless it is named."""
    busy = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(busy, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        unnamed, named = OtherWork(), OtherWork(child.pid)
        begun = cpu_seconds(child.pid)
        while cpu_seconds(child.pid) - begun < 0.3:
            time.sleep(0.02)
        spared, (available, taken) = named.taken()[1], unnamed.taken()
        child.kill()
    assert taken is not None and spared is not None
    assert taken >= 0.2 and taken - spared >= 0.2 and available > 0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("threads", "size"), [(1, 1), (2, 100_000), (3, 5_000_000)])
def test_a_bandwidth_is_measured_at_any_size(threads: int, size: int) -> None:
    memory = ReadBandwidth(threads)
    assert math.isfinite(memory.measure(size)) and memory.measure(size) > 0


def test_the_last_level_cache_is_that_of_the_highest_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bandwidth.fits(5, None) is None and bandwidth.fits(5, 5) and not bandwidth.fits(6, 5)
    monkeypatch.setattr(bandwidth, "_CACHES", tmp_path)
    assert bandwidth.last_level_cache() is None
    for number, (level, size) in enumerate([("1", "48K"), ("3", "32M"), ("2", "2048K"), ("9", "none")]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert bandwidth.last_level_cache() == 32 << 20


def test_the_shares_add_up(measured: Benchmark) -> None:
    assert sum(measured.operators.values()) == pytest.approx(1)
    assert 0 < measured.engine_share <= 1
    assert "GroupQueryAttention" in measured.operators and "If" not in measured.operators
    assert list(measured.operators.values()) == sorted(measured.operators.values(), reverse=True)


def test_full_depth_is_not_measured_twice(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "b", speedups=[1, 2], golden=False, static=True)
    bundle = Bundle.open(tmp_path / "b")
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1}
    assert [result.name for result in bench(bundle, **sizes).results] == ["full", "2"]
    assert [result.name for result in bench(bundle, depth=1, **sizes).results] == ["full"]


def test_a_depth_that_is_a_prompts_too_is_measured_from_its_prompt(bundle: Bundle) -> None:
    (depth,) = bundle.manifest.depths
    shallow = depth.model_copy(update={"prompt": depth.keep})
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"depths": (shallow,)}))
    found = bench(changed, prompt_tokens=PROMPT, new_tokens=1, repeats=1).results[1]
    assert (found.name, found.layers) == ("2", 4) and found.prefill_speedup != 1
    assert 1.5 < found.prefill_ideal_speedup < 2


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "repeats"])
def test_sizes_are_at_least_one(bundle: Bundle, name: str) -> None:
    with pytest.raises(DynexportError, match=f"^{name}: expected at least 1, found 0"):
        bench(bundle, **{"threads": 1, name: 0})


def test_lengths_that_do_not_fit_the_context(bundle: Bundle) -> None:
    with pytest.raises(DynexportError, match=r"prompt_tokens \+ new_tokens: expected at most 253 .* found 254"):
        bench(bundle, prompt_tokens=250, new_tokens=4, threads=1)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("mod") / "bundle"
    convert(CONFORMANCE / "mod-overflow", path, golden=False)
    return Bundle.open(path)


def test_routed_layers_as_routers_decide_and_as_told(routed: Bundle, tmp_path: Path) -> None:
    convert(CONFORMANCE / "mod-overflow", tmp_path / "dense", strategy="dense", golden=False)
    found = bench(
        routed,
        baseline=Bundle.open(tmp_path / "dense"),
        prompt_tokens=5,
        new_tokens=3,
        batch=2,
        repeats=2,
        skip_rates=[0, 0.5, 1],
        threads=1,
    )
    assert (found.bundle, found.baseline) == (str(routed.path), str(tmp_path / "dense"))
    results = {result.name: result for result in found.results}
    assert list(results) == ["full", "routed", "skip 0%", "skip 50%", "skip 100%"]
    # The cache has room for 11 entries a layer, and 5 + 3 + 3 tokens are fed: nothing overflows.
    assert [results[name].layers for name in ("full", "skip 0%", "skip 50%", "skip 100%")] == [4, 4, 2, 0]
    assert 0 < results["routed"].layers < 4
    cost, model = routed.manifest.cost, routed.manifest.model
    entries = 2 * sum(5 + step + 1 for step in range(3, 6))
    dense_bytes = 3 * (cost.shared + sum(Bundle.open(tmp_path / "dense").manifest.cost.layers))
    dense_bytes += entries * 4 * cost.kv_per_token
    assert results["skip 100%"].ideal_speedup == pytest.approx(dense_bytes / (3 * cost.shared))
    head = 2 * model.hidden_size * model.vocab_size
    pairs = 4 * model.heads * model.head_dim * 15
    assert results["skip 100%"].prefill_ideal_speedup == pytest.approx(
        (4 * (5 * cost.layer_flops + pairs) + head) / head
    )
    assert 1 <= results["routed"].ideal_speedup <= results["skip 100%"].ideal_speedup


def test_layer_flops_are_two_a_weight(routed: Bundle) -> None:
    tensors = load_file(CONFORMANCE / "mod-overflow" / "model.safetensors")
    matrices = [v.size for name, v in tensors.items() if ".layers.0." in name and v.ndim == 2 and "mod_" not in name]
    assert routed.manifest.cost.layer_flops == 2 * sum(matrices)


def test_prompts_from_a_text(routed: Bundle) -> None:
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "batch": 2, "threads": 1}
    assert bench(routed, text=range(8), **sizes).results[0].name == "full"
    with pytest.raises(DynexportError, match="text: expected at least 8 tokens for the prompts, found 7"):
        bench(routed, text=range(7), **sizes)


def test_dense_is_refused_where_routed_layers_have_no_room_for_every_token(
    routed: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """11 entries a layer; with a twin only what is prescribed is refused, and what routers do is counted."""
    sizes = {"new_tokens": 3, "repeats": 1, "threads": 1}
    assert bench(routed, prompt_tokens=5, **sizes).results[0].layers == 4
    with pytest.raises(DynexportError, match=r"^full: expected routed layers with room for every token, here 12"):
        bench(routed, prompt_tokens=6, **sizes)
    home = tmp_path_factory.mktemp("twin")
    convert(CONFORMANCE / "mod-overflow", home / "dense", strategy="dense", golden=False)
    sizes |= {"baseline": Bundle.open(home / "dense"), "prompt_tokens": 20, "batch": 2}
    dense, as_decided, half = bench(routed, skip_rates=[0.9], **sizes).results
    assert (dense.turned_away, half.turned_away) == (0, 0) and as_decided.turned_away > 0
    with pytest.raises(DynexportError, match=r"^skip 0%: expected room for every token that is sent"):
        bench(routed, skip_rates=[0], **sizes)


def test_dense_is_refused_where_a_single_graph_turns_tokens_away(tmp_path: Path) -> None:
    convert(CONFORMANCE / "radial-step", tmp_path / "b", layer_capacity=0.5, golden=False)
    with pytest.raises(DynexportError, match=r"^full: expected room for every token that is sent to"):
        bench(Bundle.open(tmp_path / "b"), prompt_tokens=8, new_tokens=1, repeats=1, threads=1)


OTHER_MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "model": ("dense", {}, "baseline: .*: kv_heads: expected 2 as in .*, found 4; name a bundle of the same model"),
    "layers": ("skip-2x", {}, "baseline: .*: layers: expected 4 as in .*, found 8"),
    "routers": ("mod-overflow", {}, "baseline: .*: strategy: expected one without routers, .*found mod"),
    "precision": ("mod-overflow", {"strategy": "dense", "precision": "int8"}, "precision: expected 'fp32' .*'int8'"),
    "target": ("mod-overflow", {"strategy": "dense", "target": "tensorrt"}, "target: expected 'onnxruntime' as in"),
    "context": (
        "mod-overflow",
        {"strategy": "dense", "max_length": 8},
        "baseline: .*: expected a context of 10 tokens, found 8",
    ),
    "config": ("mod-overflow", {"strategy": "dense"}, "config.json: rope_theta: expected .*found 77"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model_is_no_baseline(routed: Bundle, tmp_path: Path, name: str) -> None:
    case, how, message = OTHER_MODELS[name]
    changes = {"rope_theta": 77} if name == "config" else {}
    convert(checkpoint(tmp_path / "m", case, **changes), tmp_path / "b", golden=False, **how)
    with pytest.raises(DynexportError, match=message):
        bench(routed, baseline=Bundle.open(tmp_path / "b"), prompt_tokens=5, new_tokens=2, repeats=1, threads=1)


def test_a_baseline_that_cannot_be_loaded_any_more_is_told_in_one_line(dense_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(copied(dense_bundle, tmp_path / "b"))
    (tmp_path / "b" / "model.data").unlink()
    sizes = Sizes(rows=1, prompt_tokens=2, steps=1, threads=1, backend="onnxruntime")
    with pytest.raises(DynexportError, match=r"^baseline: .*model\.data: expected \d+ bytes, found none"):
        Twin(bundle, sizes, np.ones((1, 2), np.int64))


def test_ratios_repeat_where_their_quartiles_are_near() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)
    assert is_steady([1.6, 1.65, 1.7, 1.68, 9.0])
    assert not is_steady([1.6, 1.9, 1.7, 1.4, 1.5])
    assert not is_steady([1.6, 1.6])


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_skip_rates_are_shares(routed: Bundle, bundle: Bundle, rate: float) -> None:
    with pytest.raises(DynexportError, match="skip rates: expected shares from 0 to 1"):
        bench(routed, prompt_tokens=4, skip_rates=[rate], threads=1)
    with pytest.raises(
        DynexportError, match="skip rates: expected a bundle with routers in its layers, found unified-skip"
    ):
        bench(bundle, prompt_tokens=4, skip_rates=[0.5], threads=1)


@pytest.fixture(scope="module", params=["radial-step", "radial-layer"])
def radial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    convert(CONFORMANCE / request.param, path, golden=False)
    return Bundle.open(path)


def test_paths_as_routers_choose_and_as_told(radial: Bundle, tmp_path: Path) -> None:
    convert(CONFORMANCE / Path(radial.manifest.source.model).name, tmp_path / "dense", strategy="dense", golden=False)
    manifest = radial.manifest
    sizes = {"prompt_tokens": 5, "new_tokens": 2, "batch": 1, "repeats": 2, "threads": 1}
    found = bench(radial, baseline=Bundle.open(tmp_path / "dense"), hops=[1, 3], **sizes)
    results = {result.name: result for result in found.results}
    assert list(results) == ["full", "routed", "hops 1", "hops 3"]
    layers = manifest.model.layers
    assert [results[name].layers for name in ("full", "hops 1", "hops 3")] == [layers, 1, 3]
    assert 0 <= results["routed"].layers <= manifest.contract.max_steps
    # All layers of the pool weigh the same; 5 + 3 tokens lie before the first step that counts.
    cost, tensors = manifest.cost, load_file(CONFORMANCE / Path(manifest.source.model).name / "model.safetensors")
    router = sum(v.nbytes for name, v in tensors.items() if "radial_router" in name and not name.endswith("bias"))
    if not manifest.contract.router.shared:
        router //= manifest.contract.max_steps
    dense_bytes = 2 * (cost.shared + layers * cost.layers[0]) + (9 + 10) * layers * cost.kv_per_token
    decisions = 4 if manifest.contract.max_steps > 3 else 3  # to leave is one too
    weights = 2 * (cost.shared + decisions * router + 3 * cost.layers[0])
    if manifest.contract.cache_policy == "step":
        ideal = dense_bytes / (weights + (9 + 10) * 3 * cost.kv_per_token)
        assert results["hops 3"].ideal_speedup == pytest.approx(ideal)
    assert 1 < results["hops 3"].ideal_speedup < results["hops 1"].ideal_speedup
    assert results["hops 1"].prefill_ideal_speedup > results["hops 3"].prefill_ideal_speedup > 1
    assert {"GroupQueryAttention"} <= found.operators.keys()


def test_a_hop_that_turns_a_token_away_has_read_its_router(radial: Bundle) -> None:
    manifest, routing = radial.manifest, radial.manifest.routing
    assert isinstance(routing, PathRouting)
    path = np.full((routing.hops, 1), -1)
    nothing = path_bytes(manifest, path, np.zeros_like(path))
    path[0] = TURNED_AWAY
    assert nothing == manifest.cost.shared
    assert path_bytes(manifest, path, np.zeros_like(path)) == manifest.cost.shared + manifest.cost.router


def test_a_pool_is_its_own_dense_twin_where_its_paths_are_long_enough(radial: Bundle) -> None:
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1}
    contract, layers = radial.manifest.contract, radial.manifest.model.layers
    if contract.max_steps >= layers:
        dense = bench(radial, **sizes).results[0]
        assert (dense.layers, dense.ideal_speedup) == (layers, 1)
        assert bench(radial, **sizes).operators
    else:
        with pytest.raises(DynexportError, match=r"hops: expected .* for this bundle's paths, found"):
            bench(radial, **sizes)


def test_hops_are_those_of_paths(radial: Bundle, bundle: Bundle) -> None:
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1}
    with pytest.raises(DynexportError, match=r"hops: expected \d+..\d+ for this bundle's paths, found 99"):
        bench(radial, hops=[99], **sizes)
    with pytest.raises(
        DynexportError, match="hops: expected a bundle whose tokens take paths through a pool of layers, found unified"
    ):
        bench(bundle, hops=[1], **sizes)
