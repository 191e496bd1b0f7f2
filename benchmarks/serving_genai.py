"""Run the load of serving_peers.py with onnxruntime-genai, in this process, without HTTP; prints the figures as JSON.

    GENAI/bin/python benchmarks/serving_genai.py MODEL --way engine

For the interpreter that has onnxruntime-genai. ``engine`` is its Engine: on a CPU it runs batches of at most 4, and
begins a new batch when all rows have ended. ``batches`` is its Generator with batches of ``--rows`` prompts, padded on
the right, each to the end of its longest answer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from serving_load import Asked, OtherWork, draw_plain, figures

# Prompt and answer of the longest request.
_MOST_TOKENS = 512


class Runner:
    """A model and the ways to run requests on it.

    Args:
        directory: a directory of onnxruntime-genai's builder.
        threads: intra-op threads.
        rows: rows of a batch.
    """

    def __init__(self, directory: Path, threads: int, rows: int) -> None:
        stated = json.loads((directory / "genai_config.json").read_text())["model"]
        self.vocabulary, self._pad, self._rows = stated["vocab_size"], stated["pad_token_id"], rows
        config = genai.Config(str(directory))
        session = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(session))
        self._model = genai.Model(config)

    def engine(self, asked: list[Asked]) -> list[list[float]]:
        """Return when each request's tokens came, by the Engine."""
        engine = genai.Engine(self._model)
        buffer = engine.create_event_buffer(256)
        running: list[Any] = []
        for one in asked:
            options = genai.RequestOptions()
            options.set_max_session_tokens(_MOST_TOKENS)
            request = engine.create_request(options=options)
            turn = genai.TurnOptions(request)
            turn.set_do_sample(False)
            turn.set_min_generated_tokens(one.new_tokens)
            turn.set_max_generated_tokens(one.new_tokens)
            request.begin_turn(one.prompt.astype(np.int32), turn)
            running.append(request)
        times: list[list[float]] = [[] for _ in asked]
        while engine.has_pending_requests():
            for event in engine.run(buffer):
                if event.flags.value & genai.EngineEventFlags.FAILED.value:
                    raise SystemExit(f"onnxruntime-genai's Engine: a request failed: {event.error_code}")
                if event.flags.value & genai.EngineEventFlags.TOKEN.value:
                    index = next(index for index, each in enumerate(running) if each is event.request)
                    times[index].append(time.perf_counter())
        return times

    def batches(self, asked: list[Asked]) -> list[list[float]]:
        """Return when each request's tokens came, by Generators that run one batch after another."""
        times: list[list[float]] = [[] for _ in asked]
        for start in range(0, len(asked), self._rows):
            batch = asked[start : start + self._rows]
            width, longest = max(len(one.prompt) for one in batch), max(one.new_tokens for one in batch)
            tokens = np.full((len(batch), width), self._pad, np.int32)
            for row, one in zip(tokens, batch, strict=True):
                row[: len(one.prompt)] = one.prompt
            parameters = genai.GeneratorParams(self._model)
            most = width + longest
            parameters.set_search_options(max_length=most, min_length=most, do_sample=False, batch_size=len(batch))
            generator = genai.Generator(self._model, parameters)
            generator.append_tokens(tokens if len(batch) > 1 else tokens[0])
            for step in range(longest):
                generator.generate_next_token()
                now = time.perf_counter()
                for index, one in enumerate(batch):
                    if step < one.new_tokens:
                        times[start + index].append(now)
        return times


def main() -> None:
    """Print the figures of one run, after a small one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--way", choices=("engine", "batches"), default="engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    options = parser.parse_args()
    runner = Runner(options.model, options.threads, options.rows)
    run = getattr(runner, options.way)
    run([one._replace(new_tokens=8) for one in draw_plain(runner.vocabulary, 4, seed=1)])
    asked, work, begun = draw_plain(runner.vocabulary, options.requests), OtherWork(), time.perf_counter()
    times = run(asked)
    others = work.share()
    wrong = [(len(each), one.new_tokens) for each, one in zip(times, asked, strict=True) if len(each) != one.new_tokens]
    if wrong:
        raise SystemExit(f"onnxruntime-genai: expected {wrong[0][1]} tokens, found {wrong[0][0]}")
    print(json.dumps(figures(begun, times, sum(map(len, times))) | {"others": others}))


if __name__ == "__main__":
    main()
