"""Checks that need a GPU; each is a function that returns its result, raises ``Skipped``, or fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.cli import gpu_check_cpp
from dynexport.exporter.parity import verify
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import available_cores
from dynexport.runtime.engines.registry import RunBackend, backend_text
from dynexport.runtime.engines.tensorrt.backend import BACKENDS, BackendName, choose_target, open_backend
from dynexport.runtime.engines.tensorrt.build import build_engine
from dynexport.runtime.engines.tensorrt.builder import Builder
from dynexport.runtime.engines.tensorrt.gpu import NoGpu, find_gpu
from dynexport.runtime.engines.tensorrt.plugins import our_plugins
from dynexport.runtime.measure.bench import Benchmark, Workload, benchmark

WHAT = (
    "engines of every strategy by each installed TensorRT (built, verified, measured, run in C++), kernels of plugins, "
    "ONNX Runtime's CUDA provider, torch in eager mode and compiled"
)
# One trained sample for each strategy that has one.
SAMPLES = tuple(strategy.sample for strategy in strategies().values() if strategy.sample)
# Samples whose graphs call custom operators -> options of their conversion.
WITH_PLUGINS: Mapping[str, Mapping[str, Any]] = {
    strategy.sample: {"fields": strategy.plugin_fields, "plugins": True}
    for strategy in strategies().values()
    if strategy.sample and strategy.plugin_fields is not None
}
# The sample whose engines are also built without weights.
_STRIPPED = "skip-2"
KERNEL_TESTS = Path(__file__).resolve().parents[2] / "tests" / "plugins" / "test_operator_kernels.py"
_BATCH, _CONTEXT, _PROMPT, _NEW = 8, 256, 64, 64


class Skipped(Exception):
    """Raised with the reason why a check cannot be made on this machine."""


class Outcome(BaseModel):
    """Outcome of a check.

    Attributes:
        name: name of the check.
        state: "passed", "failed" or "skipped".
        found: the result, or the reason why the check failed or was skipped.
        seconds: time that the check took.
    """

    name: str
    state: Literal["passed", "failed", "skipped"]
    found: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """A check to make."""

    name: str
    make: Callable[[], str]

    def outcome(self) -> Outcome:
        """Make the check and return its outcome; an exception is a failure of this check only."""
        start = time.perf_counter()
        state: Literal["passed", "failed", "skipped"] = "passed"
        try:
            found = self.make()
        except Skipped as reason:
            state, found = "skipped", str(reason)
        except DynexportError as error:
            state, found = "failed", str(error)
        except Exception as error:
            state, found = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(name=self.name, state=state, found=found, seconds=time.perf_counter() - start)


def checks(samples: Path, work: Path, *, benchmarks: bool) -> Iterator[Check]:
    """Yield all checks, each after the checks that it depends on.

    Args:
        samples: directory of the trained samples.
        work: an empty directory for bundles.
        benchmarks: whether to include the benchmarks.
    """
    yield Check("GPU and driver", gpu)
    for backend in BACKENDS:
        yield Check(backend, partial(installed, backend))
    yield Check("kernels of our plugins against their bodies", kernels)
    for backend in BACKENDS:
        for sample, options in [*((sample, {}) for sample in SAMPLES), *WITH_PLUGINS.items()]:
            name = f"{backend}: {sample}{' with our plugins' if options.get('plugins') else ''}"
            bundle = work / name.replace(": ", "-").replace(" ", "-")
            run = Engines(backend, samples / sample, bundle, options)
            yield Check(f"{name}: build and verify", run.verified)
            if benchmarks:
                yield Check(f"{name}: bench", run.measured)
            if not options.get("plugins"):
                yield Check(f"{name}: the C++ runtime", run.in_cpp)
        stripped = Engines(backend, samples / _STRIPPED, work / f"{backend}-without-weights", {}, strip=True)
        yield Check(f"{backend}: {_STRIPPED} without weights: build and verify", stripped.verified)
    for sample in SAMPLES:
        yield Check(f"onnxruntime-cuda: {sample}: verify", partial(on_cuda, samples / sample, work / f"cuda-{sample}"))
    for sample in SAMPLES if benchmarks else ():
        for how in ("eager", "compiled"):
            yield Check(f"torch, {how}: {sample}", partial(torch_decode, samples / sample, compiled=how == "compiled"))


def gpu() -> str:
    """Return the GPU and the newest CUDA version that its driver supports."""
    found = find_gpu()
    if isinstance(found, NoGpu):
        raise DynexportError(found.reason)
    return str(found)


def installed(backend: BackendName) -> str:
    """Return the version of a backend."""
    try:
        return open_backend(backend).version
    except DynexportError as error:
        raise Skipped(str(error)) from error


def kernels() -> str:
    """Run the GPU tests of plugin kernels and return pytest's summary."""
    if not KERNEL_TESTS.exists() or find_spec("pytest") is None:
        raise Skipped("its tests are missing; run it in a clone of the repository, after pip install -e '.[test]'")
    # One -q without the project's own options: a second -q would suppress the summary line.
    options = ["-q", "-k", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(KERNEL_TESTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest printed nothing"])[-1]
    if done.returncode:
        raise DynexportError(last)
    if "passed" not in last:
        raise Skipped(last)
    return last


@dataclass(frozen=True)
class Engines:
    """A sample's engines on one backend.

    Attributes:
        backend: the TensorRT that builds and runs the engines.
        checkpoint: directory of the sample.
        bundle: directory of the bundle to write.
        options: options of the conversion.
        strip: whether engines are built without weights.
    """

    backend: BackendName
    checkpoint: Path
    bundle: Path
    options: Mapping[str, Any]
    strip: bool = False

    def verified(self) -> str:
        """Convert, build and verify: logits, routes, greedy tokens, batches, chunks, second turns."""
        installed(self.backend)
        options: dict[str, Any] = {"target": "tensorrt", "precision": "fp16", **self.options}
        convert(self.checkpoint, self.bundle, max_batch=_BATCH, max_length=_CONTEXT, **options)
        opened, backend = Bundle.open(self.bundle), open_backend(self.backend)
        target = choose_target(backend, None, find_gpu())
        plugins = our_plugins() if self.options.get("plugins") else None
        start = time.perf_counter()
        with Builder() as builder:
            for graph in opened.manifest.graphs:
                build_engine(opened, graph, backend, target, plugins=plugins, strip=self.strip, builder=builder)
        built = f"{len(opened.manifest.graphs)} engines for {target} in {time.perf_counter() - start:.0f} s"
        return f"{built}; {_verified(opened, self.checkpoint, self.backend)}"

    def measured(self) -> str:
        """Benchmark every run mode."""
        return _in_words(_measure(self._built(), self.backend))

    def in_cpp(self) -> str:
        """Compare the C++ runtime, where it was built, with the Python runtime on the same engines."""
        reason = gpu_check_cpp.missing(self.backend)
        if reason is not None:
            raise Skipped(reason)
        try:
            return gpu_check_cpp.compare(self._built(), self.backend)
        except gpu_check_cpp.OtherVersion as error:
            raise Skipped(str(error)) from error

    def _built(self) -> Bundle:
        if not self.bundle.exists():
            raise Skipped("there are no engines; see the outcome of its build")
        return Bundle.open(self.bundle)


def on_cuda(checkpoint: Path, bundle: Path) -> str:
    """Verify a bundle on ONNX Runtime's CUDA provider, which copies caches between host and GPU in every step."""
    try:
        engine = backend_text("onnxruntime-cuda")
    except DynexportError as error:
        raise Skipped(str(error)) from error
    convert(checkpoint, bundle)
    opened = Bundle.open(bundle)
    return f"{engine}: {_verified(opened, checkpoint, 'onnxruntime-cuda')}"


def torch_decode(checkpoint: Path, *, compiled: bool) -> str:
    """Return the time of a decode step of transformers' ``generate`` in float16, at full depth."""
    torch, transformers = _torch()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).cuda().eval()
    more: dict[str, Any] = {}
    if compiled:
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        more["cache_implementation"] = "static"
    ids = torch.randint(model.config.vocab_size, (1, _PROMPT), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for new in (1, 1 + _NEW):  # warm-up, and compilation
        seconds(new)
    steps = [(seconds(1 + _NEW) - seconds(1)) / _NEW for _ in range(5)]
    return f"{1e3 * float(np.median(steps)):.2f} ms a step, every layer, torch {torch.__version__}"


def _torch() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Skipped("torch and transformers are not installed: pip install 'dynexport[torch]'") from error
    if not torch.cuda.is_available():
        raise Skipped(f"torch {torch.__version__} has no CUDA: install a CUDA build of it")
    return torch, transformers


def _verified(bundle: Bundle, checkpoint: Path, backend: RunBackend) -> str:
    report = verify(bundle, checkpoint, backend=backend, threads=available_cores(), new_tokens=16)
    if not report.passed:
        failed = [check for check in report.checks if not check.passed]
        raise DynexportError(f"{len(failed)} checks fail, first {failed[0].name}: {'; '.join(failed[0].failures)}")
    return f"{len(report.checks)} checks against PyTorch, {report.token_agreement:.2%} of tokens agree"


def _measure(bundle: Bundle, backend: RunBackend) -> Benchmark:
    workload = Workload(available_cores(), prompt_tokens=_PROMPT, new_tokens=_NEW, repeats=5, backend=backend)
    return benchmark(bundle, workload)


def _in_words(measured: Benchmark) -> str:
    full, *others = measured.results
    told = [
        f"{r.name} ({r.layers:.3g} layers) {r.decode_milliseconds:.2f} ms, {r.speedup:.2f}x of ideal "
        f"{r.ideal_speedup:.2f}x, efficiency {r.efficiency:.2f}"
        for r in others
    ]
    return "; ".join([f"a step at full depth {full.decode_milliseconds:.2f} ms", *told])


__all__ = ["SAMPLES", "Check", "Outcome", "Skipped", "checks"]
