"""The engines that benchmarks/peers_measure.py measures. Each needs numpy and its own package only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from serving_load import OtherWork

Array = np.ndarray
# Ids below it are special tokens in most vocabularies; those above are in all that are compared.
_FIRST, _VOCABULARY = 300, 40_000
_SPARE = 8  # tokens of a context beyond prompt and steps


class Shape(NamedTuple):
    """Sizes of a measurement."""

    prompt: int
    new: int
    batch: int
    threads: int
    repeats: int

    def prompts(self, seed: int = 0) -> Array:
        """Return the prompts, int64 [batch, prompt]."""
        return np.random.default_rng(seed).integers(_FIRST, _VOCABULARY, (self.batch, self.prompt))


class Engine(Protocol):
    """An engine that runs prompts and steps one at a time; it is loaded when it is made."""

    packages: tuple[str, ...]

    def prefill(self) -> None:
        """Run the prompts on empty caches and choose the first tokens."""

    def step(self) -> None:
        """Run one greedy decode step of all rows."""


class Dynexport:
    """This project's bundle; ``depth`` is a ratio of it."""

    packages = "dynexport", "onnxruntime"

    def __init__(self, path: str, shape: Shape, settings: dict[str, str]) -> None:
        from dynexport.runtime import Bundle
        from dynexport.runtime.execution.executor import Executor

        bundle = Bundle.open(path)
        self._executor = Executor(bundle, shape.threads, weights=settings.get("weights", "packed"))
        self._depth = bundle.depth(settings.get("depth", "full"))
        self._cache = self._executor.full_cache(shape.batch, shape.prompt + shape.new + _SPARE)
        self._prompts, self._rows = list(shape.prompts()), list(range(shape.batch))
        self._executor.load(self._depth)

    def prefill(self) -> None:
        for row in self._rows:
            self._cache.rewind(row)
        logits = self._executor.prefill(self._cache, self._prompts, depth=self._depth)
        self._tokens = np.concatenate(logits).argmax(axis=-1)

    def step(self) -> None:
        depths = [self._depth] * len(self._rows)
        logits = self._executor.decode(self._cache, self._rows, self._tokens.tolist(), depths, lasting=False)
        self._tokens = logits.argmax(axis=-1)

    @staticmethod
    def logits(path: str, windows: Array, threads: int, settings: dict[str, str]) -> Array:
        """Return the logits of windows."""
        from dynexport.runtime import Bundle
        from dynexport.runtime.execution.executor import Executor

        bundle = Bundle.open(path)
        executor, depth = Executor(bundle, threads), bundle.depth(settings.get("depth", "full"))
        cache = executor.full_cache(1, windows.shape[1])
        found = []
        for window in windows:
            cache.rewind(0)
            found.append(executor.prefill(cache, [window], depth=depth, all_logits=True)[0])
        return np.stack(found)


class Llama:
    """llama.cpp by llama-cpp-python's C interface, so that its Python classes cost nothing."""

    packages = ("llama-cpp-python",)
    _BATCH = 2048

    def __init__(self, path: str, shape: Shape, settings: dict[str, str]) -> None:
        self._prompts = shape.prompts()
        # A row's part of the context is a multiple of 256.
        row = -(-(shape.prompt + shape.new + _SPARE) // 256) * 256
        self._open(path, row * shape.batch, shape.batch, shape.threads)

    def _open(self, path: str, context: int, rows: int, threads: int) -> None:
        import ctypes

        import llama_cpp as api

        self._api = api
        self._quiet = api.llama_log_callback(lambda *_: None)  # kept: the library calls it
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        how = api.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.n_batch = context, rows, self._BATCH
        how.n_threads = how.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, how)
        if not self._context:
            raise SystemExit(f"{path}: llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(self._BATCH, 0, 1)

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> list[Array]:
        """Run (token, position, row, whether logits are wanted) and return the logits."""
        batch = self._batch
        batch.n_tokens = len(items)
        for at, (token, position, row, wanted) in enumerate(items):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, wanted
            batch.seq_id[at][0] = row
        if code := self._api.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode: code {code}")
        size = (self._vocabulary,)
        at = [number for number, item in enumerate(items) if item[3]]
        return [np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, n), size) for n in at]

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def prefill(self) -> None:
        self._clear()
        count = self._prompts.shape[1]
        items = [
            (int(token), at, row, at == count - 1)
            for row, tokens in enumerate(self._prompts)
            for at, token in enumerate(tokens)
        ]
        self._tokens: list[int] = []
        for first in range(0, len(items), self._BATCH):
            self._tokens += [int(each.argmax()) for each in self._decode(items[first : first + self._BATCH])]
        self._position = count

    def step(self) -> None:
        logits = self._decode([(token, self._position, row, True) for row, token in enumerate(self._tokens)])
        self._tokens, self._position = [int(each.argmax()) for each in logits], self._position + 1

    @classmethod
    def logits(cls, path: str, windows: Array, threads: int, settings: dict[str, str]) -> Array:
        """Return the logits of windows."""
        self = cls.__new__(cls)
        self._open(path, 2 * windows.shape[1], 1, threads)
        found = []
        for window in windows:
            self._clear()
            each = self._decode([(int(token), at, 0, True) for at, token in enumerate(window)])
            found.append(np.stack([row.copy() for row in each]))
        return np.stack(found)


class Genai:
    """onnxruntime-genai's Generator."""

    packages = "onnxruntime-genai", "onnxruntime"

    def __init__(self, path: str, shape: Shape, settings: dict[str, str]) -> None:
        import onnxruntime_genai as api

        self._api, self._shape = api, shape
        self._model, self._prompts = _genai_model(path, shape.threads), shape.prompts().astype(np.int32)

    def prefill(self) -> None:
        how, length = self._api.GeneratorParams(self._model), self._shape.prompt + self._shape.new + _SPARE
        how.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=self._shape.batch)
        self._generator = self._api.Generator(self._model, how)
        self._generator.append_tokens(self._prompts if self._shape.batch > 1 else self._prompts[0])
        self._generator.generate_next_token()

    def step(self) -> None:
        self._generator.generate_next_token()

    @staticmethod
    def logits(path: str, windows: Array, threads: int, settings: dict[str, str]) -> Array:
        """Return the logits of windows."""
        import onnxruntime_genai as api

        model, found = _genai_model(path, threads), []
        for window in windows:
            how = api.GeneratorParams(model)
            how.set_search_options(max_length=len(window) + _SPARE)
            generator = api.Generator(model, how)
            generator.append_tokens(window.astype(np.int32))
            found.append(np.array(generator.get_output("logits")[0], np.float32))
        return np.stack(found)


def _genai_model(path: str, threads: int) -> Any:
    import onnxruntime_genai as api

    config = api.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return api.Model(config)


class OpenVino:
    """openvino-genai's LLMPipeline, which runs a whole generation and times it itself."""

    packages = "openvino-genai", "openvino"

    def __init__(self, path: str, shape: Shape, settings: dict[str, str]) -> None:
        import openvino_genai as api

        self._api, self._shape, self._runs = api, shape, 0
        how: dict[str, Any] = {"INFERENCE_NUM_THREADS": shape.threads, **settings}
        if shape.batch > 1:
            scheduler = api.SchedulerConfig()
            scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.cache_size = 2048, 256, 1
            scheduler.dynamic_split_fuse = True
            how["scheduler_config"] = scheduler
        self._pipeline = api.LLMPipeline(path, "CPU", **how)

    def generate(self, new: int) -> tuple[float, Array]:
        """Run other prompts than before, as it keeps prefixes; return the seconds and those between tokens."""
        import openvino

        self._runs += 1
        ids = self._shape.prompts(self._runs)
        tokens = self._api.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        how = self._api.GenerationConfig()
        how.max_new_tokens = how.min_new_tokens = new
        how.do_sample, how.ignore_eos, how.eos_token_id = False, True, -1
        start = time.perf_counter()
        found = self._pipeline.generate(tokens, how)
        seconds = time.perf_counter() - start
        if any(len(row) != new for row in found.tokens):
            raise SystemExit(f"openvino-genai: expected {new} tokens of each prompt, found fewer")
        stamps = np.asarray(found.perf_metrics.raw_metrics.m_new_token_times, float)
        return seconds, np.diff(stamps) / 1e3

    def measure(self) -> dict[str, Any]:
        """Return the times of prompts and steps."""
        shape, first = self._shape, self.generate(4)[0]
        others = OtherWork()
        prefill = [self.generate(1)[0] for _ in range(shape.repeats)]
        during = others.share()
        others = OtherWork()
        seconds, steps = self.generate(shape.new + 1)
        mean = (seconds - min(prefill)) / shape.new
        # With several prompts tokens are stamped row by row, so steps are told apart by the whole time only. Stamps
        # are milliseconds in some versions and microseconds in others.
        if shape.batch > 1 or not len(steps):
            steps = np.array([mean])
        elif np.median(steps) > 100 * mean:
            steps = steps / 1e3
        return {
            "first": first,
            "prefill": prefill,
            "steps": steps.tolist(),
            "others_prefill": during,
            "others_decode": others.share(),
        }

    @staticmethod
    def logits(path: str, windows: Array, threads: int, settings: dict[str, str]) -> Array:
        """Return the logits of windows."""
        import openvino

        how = {"INFERENCE_NUM_THREADS": threads, **settings}
        model = openvino.Core().compile_model(str(Path(path) / "openvino_model.xml"), "CPU", how)
        names = {each.get_any_name() for each in model.inputs}
        found = []
        for window in windows:
            count = len(window)
            feed = {
                "input_ids": window[None],
                "attention_mask": np.ones((1, count), np.int64),
                "position_ids": np.arange(count)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            result = model.create_infer_request().infer({name: feed[name] for name in names})
            found.append(np.array(result["logits"][0], np.float32))
        return np.stack(found)


ENGINES: dict[str, Any] = {"dynexport": Dynexport, "llama": Llama, "genai": Genai, "openvino": OpenVino}
