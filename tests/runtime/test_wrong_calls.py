"""Wrong Python calls: each is told in one line that names what was wrong, and no other exception gets out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, copied

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families import read_architecture
from dynexport.exporter.parity import verify
from dynexport.exporter.profile import ProfileDirectory, layers_to_skip, measure
from dynexport.exporter.strategies.calibration import CalibrationOptions
from dynexport.exporter.strategies.mod.calibrate import calibrate
from dynexport.exporter.trace.files import TraceFile
from dynexport.runtime import Bundle, DynexportError, Model, Sampling
from dynexport.runtime.bundle.contract import parse_contract
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.engines.registry import backend_text
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.conversation import Conversation
from dynexport.runtime.generation.sampler import Sampler
from dynexport.runtime.measure.bench import Workload, benchmark
from dynexport.runtime.measure.cost import step_bytes
from dynexport.runtime.measure.evaluate import evaluate
from dynexport.runtime.text.text import StopStrings, StreamDecoder, Text

NAN, HUGE = float("nan"), 10**400
SKIP = CONFORMANCE / "skip-2x"
ZEROS = np.zeros((1, 8), np.float32)


@pytest.fixture(scope="module")
def at(skip_bundle: Path, bundle: Bundle, generator: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the calls are made on: bundles, their generators and executors, and a cache of each executor that holds a
    token."""
    home = tmp_path_factory.mktemp("wrong")
    found = SimpleNamespace(home=home, path=skip_bundle, bundle=bundle, generator=generator, text=generator.text)
    found.skip, found.ratio = generator.executor, bundle.depth(2)
    for name in ("dense", "mod-router", "radial-step"):
        convert(CONFORMANCE / name, home / name, golden=False)
        setattr(found, name.partition("-")[0], Executor(Bundle.open(home / name), 1))
    return found


def full(executor: Any, rows: int = 1) -> Any:
    cache = executor.full_cache(rows, 8)
    executor.prefill(cache, [[1]] * rows)
    return cache


def step(executor: Any, tokens: Any, *more: Any, rows: int = 1, **named: Any) -> Any:
    return executor.step(full(executor, rows), tokens, executor.bundle.depth(1), *more, **named)


def prompt(executor: Any, prompts: Any, **named: Any) -> Any:
    return executor.prefill(executor.full_cache(1, 8), prompts, **named)


def generate(at: Any, prompts: Any = ((1, 2),), **named: Any) -> Any:
    return at.generator.generate(prompts, **{"max_new_tokens": 2, **named})


def say(at: Any, content: Any = "Hi", **named: Any) -> Any:
    how = {"depth": 1, "max_new_tokens": 2, "sampling": Sampling(), **named}
    return list(Conversation(at.generator).say(content, **how))


def bench(at: Any, bundle: Any = None, **named: Any) -> Any:
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "threads": 1, **named}
    baseline = sizes.pop("baseline", None)
    return benchmark(at.bundle if bundle is None else bundle, Workload(**sizes), baseline=baseline)


def perplexity(at: Any, ids: Any = range(40), **named: Any) -> Any:
    how = {"depths": [at.ratio], "window": 8, "prompt_tokens": 4, **named}
    return evaluate(at.bundle, ids, **how)


def thresholds(at: Any, ids: Any = range(40), **named: Any) -> Any:
    return calibrate(at.mod.bundle, ids, CalibrationOptions(**{"window": 8, **named}))


def converted(at: Any, model: Any = SKIP, output: Any = None, **named: Any) -> Any:
    return convert(model, at.home / "never" if output is None else output, **{"golden": False, **named})


def read(at: Any, ids: Any = range(40), checkpoint: Any = None, **named: Any) -> Any:
    return measure(open_checkpoint(CONFORMANCE / "dense") if checkpoint is None else checkpoint, ids, **named)


# What is called, and how the one line begins.
WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    # Bundles.
    "open-none": (lambda at: Bundle.open(None), "bundle: expected a path"),
    "open-number": (lambda at: Bundle.open(5), "bundle: expected a path"),
    "open-bytes": (lambda at: Bundle.open(b"bundle"), "bundle: expected a path"),
    "open-empty": (lambda at: Bundle.open(""), "."),
    "open-nul": (lambda at: Bundle.open("a\0b"), "a"),
    "open-long": (lambda at: Bundle.open("x" * 300), "x"),
    "open-a-file": (lambda at: Bundle.open(at.path / "model.onnx"), "/"),
    "depth-list": (lambda at: at.bundle.depth([2]), "{path}: depth: expected 1, 2; found [2]"),
    "depth-huge": (lambda at: at.bundle.depth(HUGE), "{path}: depth: expected 1, 2; found 1000"),
    "depth-nan": (lambda at: at.bundle.depth(NAN), "{path}: depth: expected 1, 2; found nan"),
    "depth-bool": (lambda at: at.bundle.depth(True), "{path}: depth: expected 1, 2; found True"),
    # Generators.
    "generator-of-a-path": (lambda at: Model(at.path), "bundle: expected an opened Bundle"),
    "generator-of-none": (lambda at: Model(None), "bundle: expected an opened Bundle"),
    "generator-threads-text": (lambda at: Model(at.bundle, threads="2"), "threads: expected 1..256, found '2'"),
    "generator-threads-part": (lambda at: Model(at.bundle, threads=1.5), "threads: expected 1..256, found 1.5"),
    "generator-threads-bool": (lambda at: Model(at.bundle, threads=True), "threads: expected 1..256, found True"),
    "generator-backend": (lambda at: Model(at.bundle, backend="cpu"), "backend: expected onnxruntime"),
    "generator-backend-none": (lambda at: Model(at.bundle, backend=None), "backend: expected onnxruntime"),
    "executor-profile": (lambda at: Executor(at.bundle, profile=5), "profile: expected a path"),
    "generate-mixed": (lambda at: generate(at, [[1], 2]), "prompt: expected a list of token ids, found 2"),
    "generate-text-for-none": (lambda at: Model(at.dense.bundle).generate("a"), "tokenizer.json: "),
    "choices-none": (lambda at: at.generator.choices([1], 0), "n: expected 1..128, found 0"),
    "choices-text": (lambda at: at.generator.choices([1], "2"), "n: expected 1..128, found '2'"),
    "generate-depth": (lambda at: generate(at, depth={2: 1}), "depth: expected a ratio, a name or a Depth"),
    "generate-depths": (lambda at: generate(at, depth=[2, 1]), "depth: expected one, or 1, one for each prompt"),
    "generate-chat": (lambda at: generate(at, chat="yes"), "chat: expected true or false"),
    "generate-bytes": (lambda at: generate(at, [b"ab"]), "prompt: expected a list of token ids, found b'ab'"),
    "generate-none": (lambda at: generate(at, None), "prompts: expected a list of prompts"),
    "generate-none-inside": (lambda at: generate(at, [None]), "prompt: expected a list of token ids, found None"),
    "generate-mapping": (lambda at: generate(at, {"a": [1]}), "prompts: expected a list of prompts"),
    "generate-no-prompts": (lambda at: generate(at, iter(())), "prompts: expected at least one, found none"),
    "generate-empty": (lambda at: generate(at, [np.array([], np.int64)]), "prompt: expected at least one token"),
    "generate-floats": (lambda at: generate(at, [np.array([1.0])]), "prompt: expected token ids 0..88, found"),
    "generate-nested": (lambda at: generate(at, np.ones((1, 1, 1), int)), "prompt: expected token ids 0..88, found"),
    "generate-scalar": (lambda at: generate(at, np.array(3)), "prompts: expected a list of prompts"),
    "generate-bool": (lambda at: generate(at, [[True]]), "prompt: expected token ids 0..88, found True"),
    "generate-numpy-bool": (lambda at: generate(at, [np.array([True])]), "prompt: expected token ids 0..88, found"),
    "generate-negative": (lambda at: generate(at, [np.array([-1])]), "prompt: expected token ids 0..88, found -1"),
    "generate-too-long": (lambda at: generate(at, [[1] * 257]), "prompt: expected at most 256 tokens"),
    "generate-tokens-text": (lambda at: generate(at, max_new_tokens="3"), "max_new_tokens: expected at least 1"),
    "generate-tokens-part": (lambda at: generate(at, max_new_tokens=2.0), "max_new_tokens: expected at least 1"),
    "generate-tokens-nan": (lambda at: generate(at, max_new_tokens=NAN), "max_new_tokens: expected at least 1"),
    "generate-tokens-none": (lambda at: generate(at, max_new_tokens=None), "max_new_tokens: expected at least 1"),
    "generate-sampling": (
        lambda at: generate(at, sampling={"top_k": 3}),
        "sampling: expected a Sampling, or one for each",
    ),
    "generate-sampling-none": (
        lambda at: generate(at, sampling=None),
        "sampling: expected a Sampling, or one for each",
    ),
    "generate-stop-none": (lambda at: generate(at, stop=None), "stop: expected a list of strings, found None"),
    "generate-stop-number": (lambda at: generate(at, stop=[5]), "stop: expected a list of strings, found 5"),
    "generate-stop-empty": (lambda at: generate(at, stop=[""]), "stop: expected non-empty strings"),
    "stream-cache": (lambda at: at.generator.stream([[1]], cache="x"), "cache: expected one of Executor.cache"),
    "stream-cache-rows": (
        lambda at: list(at.generator.stream([[1]], cache=at.skip.full_cache(2, 8))),
        "cache: expected 1 rows, one for each answer, found 2",
    ),
    "stream-cache-of-radial": (
        lambda at: list(at.generator.stream([[1]], cache=at.radial.full_cache(1, 8))),
        "cache: expected one of Executor.cache",
    ),
    "stream-cache-of-another": (
        lambda at: list(at.generator.stream([[1]], cache=at.dense.full_cache(1, 8))),
        "cache: expected one of Executor.cache",
    ),
    # Conversations.
    "conversation-of-a-bundle": (lambda at: Conversation(at.bundle), "model: expected a Model"),
    "conversation-system": (lambda at: Conversation(at.generator, system=5), "system: expected text or None"),
    "say-none": (lambda at: say(at, None), "messages[0]: expected text"),
    "say-bytes": (lambda at: say(at, b"Hi"), "messages[0]: expected text"),
    "say-tokens": (lambda at: say(at, max_new_tokens=-1), "max_new_tokens: expected at least 1"),
    "say-without-a-template": (
        lambda at: list(Conversation(Model(at.dense.bundle)).say("Hi", depth=1, max_new_tokens=1, sampling=Sampling())),
        "chat_template.jinja: the bundle has no chat template",
    ),
    # Text.
    "encode-none": (lambda at: at.text.encode(None), "text: expected text, found None"),
    "encode-bytes": (lambda at: at.text.encode(b"a"), "text: expected text, found b'a'"),
    "encode-half": (lambda at: at.text.encode("caf\udce9"), "text: expected UTF-8, found '\\udce9' after 3 char"),
    "decode-number": (lambda at: at.text.decode(5), "tokenizer.json: cannot decode"),
    "decode-negative": (lambda at: at.text.decode([-1]), "tokenizer.json: cannot decode"),
    "decode-part": (lambda at: at.text.decode([1.5]), "tokenizer.json: cannot decode"),
    "chat-none": (lambda at: at.text.chat(None), "messages: expected"),
    "chat-text": (lambda at: at.text.chat("Hi"), "messages: expected"),
    "chat-of-texts": (lambda at: at.text.chat(["Hi"]), "messages[0]: expected"),
    "chat-empty": (lambda at: at.text.chat([]), "messages: expected at least one, found none"),
    "files-none": (lambda at: Text.from_files(None), "files: expected"),
    "files-text": (lambda at: Text.from_files({"tokenizer.json": "{}"}), "tokenizer.json: "),
    "executor-of-none": (lambda at: StreamDecoder(None), "text: expected a Text, found None"),
    "push-text": (lambda at: StreamDecoder(at.text).push("a"), "tokenizer.json: cannot look up"),
    "stops-number": (lambda at: StopStrings(5), "stop: expected a list of strings"),
    # Sampling.
    "temperature-none": (lambda at: Sampling(temperature=None), "temperature: expected a finite number >= 0"),
    "temperature-array": (lambda at: Sampling(temperature=np.ones(2)), "temperature: expected a finite number"),
    "temperature-complex": (lambda at: Sampling(temperature=1j), "temperature: expected a finite number >= 0"),
    "temperature-huge": (lambda at: Sampling(temperature=HUGE), "temperature: expected a finite number >= 0"),
    "top-p-text": (lambda at: Sampling(top_p="0.9"), "top_p: expected 0 < top_p <= 1"),
    "top-k-part": (lambda at: Sampling(top_k=2.0), "top_k: expected an integer >= 0"),
    "seed-bool": (lambda at: Sampling(seed=True), "seed: expected an integer >= 0"),
    "sampler-of-none": (lambda at: Sampler(None, 1), "sampling: expected a Sampling"),
    "sampler-rows": (lambda at: Sampler(Sampling(), -1), "rows: expected at least 1, found -1"),
    "sampler-list": (lambda at: Sampler(Sampling(), 1)([[1.0, 2.0]]), "logits: expected floating-point numbers"),
    "sampler-none": (lambda at: Sampler(Sampling(), 1)(None), "logits: expected floating-point numbers"),
    "sampler-text": (lambda at: Sampler(Sampling(), 1)(np.array([["a"]])), "logits: expected floating-point numbers"),
    "sampler-whole": (lambda at: Sampler(Sampling(), 1)(np.ones((1, 4), int)), "logits: expected floating-point"),
    # Executors and caches.
    "cache-rows": (lambda at: at.skip.full_cache(0, 8), "rows: expected at least 1, found 0"),
    "cache-rows-text": (lambda at: at.mod.full_cache("1", 8), "rows: expected at least 1, found '1'"),
    "cache-rows-part": (lambda at: at.radial.full_cache(1.5, 8), "rows: expected at least 1, found 1.5"),
    "cache-slots": (lambda at: at.skip.full_cache(1, -1), "slots: expected at least 1, found -1"),
    "cache-slots-none": (lambda at: at.radial.full_cache(1, None), "slots: expected at least 1, found None"),
    "cache-of-none": (lambda at: KvCache(None, None, None, 1, 8, counters=0), "manifest: expected a Manifest"),
    "cache-row": (lambda at: at.skip.full_cache(2, 8).mark(2), "row: expected 0..1, found 2"),
    "cache-row-text": (lambda at: at.skip.full_cache(2, 8).mark("a"), "row: expected 0..1, found 'a'"),
    "prefill-cache-none": (lambda at: at.skip.prefill(None, [[1]]), "cache: expected one of Executor.cache"),
    "prefill-two-for-one": (lambda at: prompt(at.skip, [[1], [2]]), "prompts: expected 1, one for each row"),
    "prefill-chunk": (lambda at: prompt(at.skip, [[1]], chunk=0), "chunk: expected at least 1, found 0"),
    "prefill-chunk-radial": (lambda at: prompt(at.radial, [[1]], chunk=-1), "chunk: expected at least 1, found -1"),
    "prefill-chunk-text": (lambda at: prompt(at.mod, [[1]], chunk="8"), "chunk: expected at least 1, found '8'"),
    "logits-number": (lambda at: prompt(at.skip, [[1]], logits_at=0), "logits_at: expected a list of 1, one a row"),
    "logits-outside": (lambda at: prompt(at.mod, [[1]], logits_at=[[1]]), "logits_at: expected 0..0, found 1"),
    "logits-order": (lambda at: prompt(at.radial, [[1, 2]], logits_at=[[1, 0]]), "logits_at: expected ascending"),
    "forced-dense": (lambda at: prompt(at.dense, [[1]], forced=[np.ones((1, 1))]), "forced: expected None"),
    "forced-shape": (lambda at: prompt(at.mod, [[1]], forced=[np.ones((1, 1), bool)]), "forced: expected bool or"),
    "forced-floats": (lambda at: prompt(at.mod, [[1]], forced=[np.ones((2, 1))]), "forced: expected bool or whole"),
    "forced-ragged": (lambda at: prompt(at.mod, [[1]], forced=[[[1], [1, 2]]]), "forced: expected an array of shape"),
    "forced-number": (lambda at: prompt(at.mod, [[1]], forced=1), "forced: expected a list of 1, one a row"),
    "forced-two": (lambda at: step(at.mod, [1], forced=np.full((2, 1), 2)), "forced: expected 1 to run, 0 to skip"),
    "forced-path": (
        lambda at: prompt(at.radial, [[1, 2]], forced=[np.zeros((1, 1), int)]),
        "forced: expected bool or whole numbers of shape",
    ),
    "step-token": (lambda at: step(at.skip, [89]), "tokens: expected token ids 0..88, found 89"),
    "step-token-negative": (lambda at: step(at.mod, [-1]), "tokens: expected token ids 0..88, found -1"),
    "step-token-radial": (lambda at: step(at.radial, np.array([-1])), "tokens: expected token ids"),
    "step-floats": (lambda at: step(at.skip, [1.0]), "tokens: expected token ids 0..88, found 1.0"),
    "step-none": (lambda at: step(at.skip, None), "tokens: expected a list of token ids, found None"),
    "step-two-for-one": (
        lambda at: step(at.skip, [1, 2]),
        "tokens: expected 1, one for each row",
    ),
    "step-none-for-one": (lambda at: step(at.radial, []), "tokens: expected 1, one for each row"),
    "step-live": (lambda at: step(at.skip, [1], np.ones(2, bool)), "live: expected bool of shape [1], one a row"),
    "step-live-numbers": (
        lambda at: step(at.skip, [1], [1]),
        "live: expected bool of shape [1], one a row",
    ),
    "step-live-text": (lambda at: step(at.radial, [1], "yes"), "live: expected a list of 1 bools"),
    "step-depth": (lambda at: at.skip.step(full(at.skip), [1], 2), "depth: expected one of Bundle.depth, found 2"),
    "step-depth-layers": (
        lambda at: at.skip.step(full(at.skip), [1], Depth(name="x", ratio=None, keep=(99,), prompt=(99,))),
        "depth: a kept layer: expected 0..7, found 99",
    ),
    # Measuring.
    "bench-of-a-path": (lambda at: bench(at, at.path), "bundle: expected an opened Bundle"),
    "bench-prompt": (lambda at: bench(at, prompt_tokens="4"), "prompt_tokens: expected at least 1, found '4'"),
    "bench-batch": (lambda at: bench(at, batch=1.0), "batch: expected at least 1, found 1.0"),
    "bench-repeats": (lambda at: bench(at, repeats=None), "repeats: expected at least 1, found None"),
    "bench-threads": (lambda at: bench(at, threads=None), "threads: expected 1..256, found None"),
    "bench-baseline": (lambda at: bench(at, baseline="dense"), "baseline: expected an opened Bundle"),
    "bench-text": (lambda at: bench(at, text="a book"), "text: expected a list of token ids"),
    "bench-text-ids": (lambda at: bench(at, text=[99] * 4), "text: expected token ids 0..88, found 99"),
    "bench-rate": (lambda at: bench(at, at.mod.bundle, skip_rates=["half"]), "skip rates: expected shares from 0 to 1"),
    "bench-rates": (lambda at: bench(at, at.mod.bundle, skip_rates=0.5), "skip rates: expected a list"),
    "bench-hops": (lambda at: bench(at, at.radial.bundle, hops=[1.5]), "hops: expected"),
    "bench-backend": (lambda at: bench(at, backend="cpu"), "backend: expected onnxruntime"),
    "bench-depth": (lambda at: bench(at, depth=[2]), "{path}: depth: expected 1, 2; found [2]"),
    "eval-none": (lambda at: perplexity(at, None), "text: expected a list of token ids, found None"),
    "eval-text": (lambda at: perplexity(at, "a book"), "text: expected a list of token ids, found 'a book'"),
    "eval-floats": (lambda at: perplexity(at, [1.5] * 20), "text: expected token ids 0..88, found 1.5"),
    "eval-huge": (lambda at: perplexity(at, [1 << 70] * 20), "text: expected token ids 0..88, found 118059"),
    "eval-window": (lambda at: perplexity(at, window="8"), "window: expected 1 <= prompt_tokens < window"),
    "eval-prompt": (lambda at: perplexity(at, prompt_tokens=None), "window: expected 1 <= prompt_tokens < window"),
    "eval-max": (lambda at: perplexity(at, max_tokens=NAN), "max_tokens: expected at least one window of 8"),
    "eval-batch": (lambda at: perplexity(at, batch="8"), "batch: expected at least 1, found '8'"),
    "eval-depths": (lambda at: perplexity(at, depths=[2]), "depths: expected those of Bundle.depth, found 2"),
    "eval-no-depths": (lambda at: perplexity(at, depths=[]), "depths: expected at least one, found none"),
    "eval-depths-none": (lambda at: perplexity(at, depths=None), "depths: expected a list"),
    "calibrate-rate": (lambda at: thresholds(at, target_rate="half"), "target_rate: expected 0 < target_rate <= 1"),
    "calibrate-rate-nan": (lambda at: thresholds(at, target_rate=NAN), "target_rate: expected 0 < target_rate <= 1"),
    "calibrate-window": (lambda at: thresholds(at, window=8.0), "window: expected 1..256, found 8.0"),
    "calibrate-ids": (lambda at: thresholds(at, 5), "text: expected a list of token ids, found 5"),
    "calibrate-of-none": (
        lambda at: calibrate(None, [1], CalibrationOptions()),
        "bundle: expected an opened Bundle",
    ),
    "verify-of-a-number": (lambda at: verify(5), "bundle: expected a path"),
    "verify-tokens": (lambda at: verify(at.bundle, SKIP, new_tokens="3"), "new_tokens: expected at least 1, found '3'"),
    "verify-prompts": (lambda at: verify(at.bundle, SKIP, prompts="ab"), "prompts: expected a list of prompts"),
    "verify-flat-prompt": (lambda at: verify(at.bundle, SKIP, prompts=[1]), "prompt: expected a list of token ids"),
    "verify-against": (lambda at: verify(at.bundle, 5), "model: expected a path or a hub id, found 5"),
    "profile-of-a-path": (lambda at: read(at, checkpoint="dense"), "checkpoint: expected an opened checkpoint"),
    "profile-ids": (lambda at: read(at, "a book"), "text: expected a list of token ids"),
    "profile-window": (lambda at: read(at, window="8"), "window: expected"),
    "profile-batch": (lambda at: read(at, batch=0.5, window=8), "batch: expected at least 1, found 0.5"),
    "profile-skip": (lambda at: layers_to_skip(8, skip="2"), "skip: expected 0..7"),
    "profile-budget": (lambda at: layers_to_skip(8, budget="half"), "budget: expected a share"),
    "cost-keep": (lambda at: step_bytes(at.bundle.manifest, [99], 8), "keep: a layer: expected 0..7, found 99"),
    "cost-keep-none": (lambda at: step_bytes(at.bundle.manifest, None, 8), "keep: expected a list of layers"),
    "backend-in-words": (lambda at: backend_text("cpu"), "backend: expected onnxruntime"),
    "trace-none": (lambda at: TraceFile(None), "trace: expected a path, found None"),
    "profile-to-a-number": (lambda at: ProfileDirectory(5), "profile: expected a path, found 5"),
    # Converting.
    "convert-none": (lambda at: converted(at, None), "model: expected a path or a hub id, found None"),
    "convert-bytes": (lambda at: converted(at, b"model"), "model: expected a path or a hub id, found b'model'"),
    "convert-to-a-number": (lambda at: converted(at, output=5), "output: expected a path, found 5"),
    "convert-strategy": (lambda at: converted(at, strategy=5), "{model}: strategy: expected dense"),
    "convert-speedup": (lambda at: converted(at, speedups=2), "speedups: expected a list of numbers, found 2"),
    "convert-speedups": (lambda at: converted(at, speedups="23"), "speedups: expected a list of numbers, found '23'"),
    "convert-speedup-text": (lambda at: converted(at, speedups=["x"]), "{model}: contract: unified-skip.speedups.0"),
    "convert-keep": (lambda at: converted(at, keep=3), "keep: expected a list of layers, found 3"),
    "convert-fields": (lambda at: converted(at, fields=["keep"]), "fields: expected a mapping"),
    "convert-length": (lambda at: converted(at, max_length="64"), "max_length: expected 1..256 tokens, found '64'"),
    "convert-length-part": (
        lambda at: converted(at, max_length=64.0),
        "max_length: expected 1..256 tokens",
    ),
    "convert-precision": (lambda at: converted(at, precision=["fp32"]), "precision: expected one of auto"),
    "convert-target": (lambda at: converted(at, target=None), "target: expected one of onnxruntime"),
    "convert-capacity": (lambda at: converted(at, layer_capacity="all"), "layer capacity: expected a share above 0"),
    "convert-batch": (lambda at: converted(at, target="tensorrt", max_batch="8"), "max_batch: expected"),
    "convert-prompt": (lambda at: converted(at, target="tensorrt", max_prompt=8.5), "max_prompt: expected"),
    "convert-tokenizer": (lambda at: converted(at, tokenizer=5), "tokenizer: expected a path, found 5"),
    "convert-importer": (lambda at: converted(at, importer=["astramind"]), "import: expected astramind or"),
    "convert-keep-layer": (lambda at: converted(at, keep=["0"]), "{model}: contract: unified-skip.keep.0"),
    "family-list": (lambda at: read_architecture([]), "config: expected a mapping of config.json's fields"),
    "contract-field": (lambda at: parse_contract({"strategy": "radial", "steps": 3}, "here"), "here: radial.steps: "),
    "contract-list": (lambda at: parse_contract([1], "here"), "here: "),
    "contract-none": (lambda at: parse_contract(None, "here"), "here: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_told_in_one_line(at: Any, name: str) -> None:
    call, begins = WRONG[name]
    with pytest.raises(DynexportError) as told:
        call(at)
    message = str(told.value)
    assert message.startswith(begins.format(path=at.path, model=SKIP)), message
    assert "\n" not in message and len(message) < 1000
    assert not (at.home / "never").exists()


def test_a_wrong_call_leaves_a_cache_as_it_was(at: Any) -> None:
    cache = full(at.mod)
    before = at.mod.step(cache, [1], at.mod.bundle.depth(1))
    cache = full(at.mod)
    for wrong in ([1, 2], ["x"], [-1], None):
        with pytest.raises(DynexportError):
            at.mod.step(cache, wrong, at.mod.bundle.depth(1))
    np.testing.assert_array_equal(at.mod.step(cache, [1], at.mod.bundle.depth(1)), before)


def test_what_is_not_wrong(at: Any, tmp_path: Path) -> None:
    """Numbers of numpy, paths as text, and whatever gives items one by one."""
    expected = generate(at, max_new_tokens=3, sampling=Sampling(temperature=0.5, top_k=4, top_p=0.5, seed=1))
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(4), top_p=np.float64(0.5), seed=np.uint8(1))
    for prompts in ((prompt for prompt in [iter([1, 2])]), np.array([[1, 2]], np.uint16), [range(1, 3)]):
        assert generate(at, prompts, max_new_tokens=np.int32(3), sampling=sampling) == expected
    assert Model(Bundle.open(str(at.path)), np.int64(1)).generate([[1]], max_new_tokens=1)
    assert at.bundle.depth(np.float32(2)) == at.ratio == at.bundle.depth("2")
    copy = copied(at.path, tmp_path / "b")
    assert bench(at, Bundle.open(copy), text=(token for token in range(4)), skip_rates=()).results
    assert perplexity(at, iter(range(16)), depths=(at.ratio,))[0].tokens == 8
    assert step(at.mod, np.array([1], np.int32), [True], forced=[[1], [0]]).shape == (1, 89)
