"""Loading: times of a start, what of a file is in memory, and weights that stay in the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bundles import CONFORMANCE, dynexport, error_of

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, load
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.bench import Workload, benchmark
from dynexport.runtime.measure.startup import StartClock, page_cache_share, process_seconds

# Prints its kilobytes of memory that other processes use too, and its own, when both are ready.
MAPPER = """
import sys
from dynexport.runtime import Bundle
from dynexport.runtime.execution.executor import Executor
executor = Executor(Bundle.open(sys.argv[1]), 1, weights=sys.argv[2])
cache = executor.full_cache(1, 8)
executor.prefill(cache, [[1, 2, 3]])
print("ready", flush=True)
sys.stdin.readline()
lines = open("/proc/self/smaps").read().split("VmFlags")
found = [part for part in lines if "/model.data" in part]
print(sum(int(row.split()[1]) for part in found for row in part.splitlines() if row.startswith("Shared_Clean:")))
"""


def test_a_start_counts_from_the_begin_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(10_000))
    before, clock = process_seconds(), StartClock(tmp_path)
    clock.loaded()
    startup = clock.first_token()
    assert before is not None and startup.begin_seconds is not None and startup.first_token_seconds is not None
    assert 0 < before <= startup.begin_seconds <= startup.first_token_seconds
    assert 0 <= startup.load_seconds <= startup.first_token_seconds
    assert startup.page_cache_share == 1  # it was written just now


def test_the_seconds_of_a_process_are_those_that_its_parent_counts() -> None:
    asked = "from dynexport.runtime.measure.startup import process_seconds; print(process_seconds())"
    start = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True).stdout)
    # Clock ticks: the start is known to a hundredth of a second.
    assert 0 < told <= time.monotonic() - start + 0.02


def test_pages_of_files_without_content_or_access(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert page_cache_share([tmp_path / "empty", tmp_path / "none"]) is None
    assert StartClock(tmp_path / "none").first_token().page_cache_share is None


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "bundle"
    convert(CONFORMANCE / "dense", path, precision="int8", golden=False)
    return path


def test_mapped_weights_compute_the_same(bundle: Bundle) -> None:
    prompts = [np.arange(3, 12), np.arange(20, 25)]
    logits = []
    for weights in ("packed", "mapped"):
        executor = Executor(bundle, 1, weights=weights)
        cache = executor.full_cache(2, 16)
        first = executor.prefill(cache, prompts)
        logits.append(np.concatenate([*first, executor.step(cache, [5, 6], bundle.depth(2))]))
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_mapped_weights_are_shared_by_two_processes(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "b", golden=False)
    size = (tmp_path / "b" / "model.data").stat().st_size
    command = [sys.executable, "-c", MAPPER, str(tmp_path / "b"), "mapped"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        for process in (one, other):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        shared, _ = one.communicate("\n")
        other.communicate("\n")
    assert int(shared) * 1024 > size / 2


def test_weights_that_only_packing_makes_fast_are_refused(int8: Path, bundle: Bundle) -> None:
    with pytest.raises(DynexportError, match=r"^weights: expected packed for .*, which is int8 .*, found mapped"):
        load(int8, weights="mapped")
    with pytest.raises(DynexportError, match=r"^weights: expected packed, mapped, found 'fast'"):
        load(bundle.path, weights="fast")
    with pytest.raises(DynexportError, match=r"^weights: expected packed on tensorrt, found mapped"):
        Executor(bundle, backend="tensorrt", weights="mapped")
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1}
    with pytest.raises(DynexportError, match=r"^weights: expected packed for"):
        benchmark(Bundle.open(int8), Workload(weights="mapped", **sizes))
    assert "weights: expected packed" in error_of(dynexport("run", int8, "--ids", "1", "--weights", "mapped"))


def test_run_and_bench_report_a_start(bundle: Bundle) -> None:
    arguments = ["--ids", "1,2", "--max-new-tokens", 3, "--weights", "mapped", "--stats", "--json", "-"]
    ran = dynexport("run", bundle.path, *arguments)
    assert ran.code == 0 and "first token " in ran.err and " ms a token" in ran.err
    timings = json.loads(ran.out)["timings"]
    assert 0 < timings["begin_seconds"] <= timings["first_token_seconds"] and timings["token_milliseconds"] > 0
    assert timings["load_seconds"] > 0 and timings["page_cache_share"] == 1
    assert "--stats: expected --prompt or --ids" in error_of(dynexport("run", bundle.path, "--chat", "--stats"))
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1}
    measured = benchmark(bundle, Workload(weights="mapped", **sizes))
    start = measured.startup
    assert measured.weights == "mapped" and start.begin_seconds is not None and start.first_token_seconds is not None
    assert start.begin_seconds + start.load_seconds <= start.first_token_seconds + 0.02
