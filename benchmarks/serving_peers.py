"""Compare ``dynexport serve`` with other servers under the load of serving.py, over HTTP, in rounds.

    python benchmarks/serving_peers.py build/skip-int8 --peer llama.cpp=build/q8_0.gguf --peer genai=build/genai-int8

24 requests at once, prompts of 16 to 256 tokens, 8 to 128 new ones, greedy, streamed; no answer ends before its length.
Every round starts each server anew with ``--threads`` threads and ``--rows`` rows, warms it up, sends the requests and
ends it. A peer is KIND=MODEL:

    dynexport=BUNDLE          another bundle; BUNDLE@2 runs it at a depth
    cpp=BUNDLE                the service in C++ (--cpp-service), with ONNX Runtime's library of this interpreter
    llama.cpp=GGUF            llama-server (--llama-server)
    genai=DIRECTORY           onnxruntime-genai's Engine, in a process, without HTTP (--genai-python)
    genai-batches=DIRECTORY   its Generator in batches of --rows

Prints medians over the rounds, and the median of the neighbours' ratios. docs/benchmarks.md says how to get the peers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
from http_streams import Stream, free_port, is_up, send_all
from serving_load import Asked, OtherWork, draw_plain, figures

Figures = dict[str, float]
_VOCABULARY = 49152  # of SmolLM2
_MOST_TOKENS = 512
_START_SECONDS, _RUN_SECONDS = 120, 900
_HOW = "docs/benchmarks.md, 'Serving beside other servers', says how to get it"
_GENAI_WAYS = {"genai": "engine", "genai-batches": "batches"}


class Missing(Exception):
    """A program or a model that a peer needs is not there."""


class HttpServer:
    """A server that is started for each measurement.

    Args:
        options: the program's options.
        model: the model's path.
    """

    command: list[str]
    ready: str
    path: str

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        self._options, self._model = options, model

    def body(self, asked: Asked) -> dict[str, Any]:
        """Return the request's body."""
        raise NotImplementedError

    def tokens(self, stream: Stream) -> int:
        """Return the number of tokens of an answer, as the server counts them."""
        raise NotImplementedError

    def measure(self) -> Figures:
        """Start the server, warm it up, send the requests and return the figures."""
        port = free_port()
        with self._started(port) as process:
            warm = [one._replace(new_tokens=8) for one in draw_plain(_VOCABULARY, 4, seed=1)]
            asyncio.run(asyncio.wait_for(self._send(port, warm), _RUN_SECONDS))
            asked, work = draw_plain(_VOCABULARY, self._options.requests), OtherWork(process.pid)
            begun = time.perf_counter()
            streams = asyncio.run(asyncio.wait_for(self._send(port, asked), _RUN_SECONDS))
            others = work.share()
        counts = [self.tokens(stream) for stream in streams]
        wanted = [one.new_tokens for one in asked]
        if counts != wanted:
            raise SystemExit(f"{self._model}: expected answers of {wanted} tokens, found {counts}")
        return figures(begun, [stream.times for stream in streams], sum(counts)) | {"others": others}

    async def _send(self, port: int, asked: list[Asked]) -> list[Stream]:
        streams = await send_all(port, self.path, [self.body(one) for one in asked])
        for stream in streams:
            if stream.status != 200 or not stream.times:
                raise SystemExit(f"{self._model}: expected status 200, found {stream.status}: {stream.content[:200]!r}")
        return streams

    @contextmanager
    def _started(self, port: int) -> Iterator[subprocess.Popen[bytes]]:
        """Run the server until the block ends."""
        command = [*self.command, "--host", "127.0.0.1", "--port", str(port)]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                begun = time.monotonic()
                while not is_up(port, self.ready):
                    if process.poll() is not None or time.monotonic() - begun > _START_SECONDS:
                        log.seek(0)
                        end = log.read().decode(errors="replace").strip()[-2000:]
                        raise SystemExit(f"{' '.join(command)}: expected a running server, found:\n{end}")
                    time.sleep(0.05)
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


class Dynexport(HttpServer):
    """``dynexport serve`` with a bundle, at the depth that may follow its path: BUNDLE@2."""

    ready, path = "/ready", "/v1/completions"

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        super().__init__(options, model)
        bundle, _, self._depth = model.partition("@")
        _require(Path(bundle) / "manifest.json", "a bundle")
        self.command = [sys.executable, "-m", "dynexport", "serve", bundle, "--name", "model"]
        self.command += ["--threads", str(options.threads), "--max-rows", str(options.rows)]
        self.command += ["--max-length", str(_MOST_TOKENS), "--prefix-cache", "0"]

    def body(self, asked: Asked) -> dict[str, Any]:
        """Return the request's body."""
        return {
            "model": "model",
            "prompt": asked.prompt.tolist(),
            "max_tokens": asked.new_tokens,
            "min_tokens": asked.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "depth": self._depth or "full",
        }

    def tokens(self, stream: Stream) -> int:
        """Return the usage's count."""
        return int(json.loads(stream.events[-1])["usage"]["completion_tokens"])


class CppService(Dynexport):
    """``samples/cpp_service``; the rest as ``Dynexport``."""

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        super().__init__(options, model)
        program = shutil.which(options.cpp_service)
        if program is None:
            raise Missing(f"--cpp-service {options.cpp_service}: expected the built service, found none; docs/cpp.md")
        library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
        self.command = [program, *self.command[4:], "--onnxruntime", str(library)]


class LlamaCpp(HttpServer):
    """llama.cpp's server with a GGUF: continuous batching, a slot per row, nothing kept of earlier prompts."""

    ready, path = "/health", "/completion"

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        super().__init__(options, model)
        _require(Path(model), "a GGUF")
        program = shutil.which(options.llama_server)
        if program is None:
            raise Missing(f"--llama-server {options.llama_server}: expected llama.cpp's server, found none; {_HOW}")
        self.command = [program, "--model", model, "--cont-batching", "--parallel", str(options.rows)]
        self.command += ["--ctx-size", str(options.rows * _MOST_TOKENS), "--no-kv-unified"]
        self.command += ["--threads", str(options.threads), "--threads-batch", str(options.threads)]
        self.command += ["--no-cache-prompt", "--cache-ram", "0", "--no-ui", *options.llama_option]

    def body(self, asked: Asked) -> dict[str, Any]:
        """Return the request's body: of its samplers only the one that takes the most probable token."""
        return {
            "prompt": asked.prompt.tolist(),
            "n_predict": asked.new_tokens,
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "stream": True,
        }

    def tokens(self, stream: Stream) -> int:
        """Return the last event's count."""
        return int(json.loads(stream.events[-1])["tokens_predicted"])


class Genai:
    """onnxruntime-genai in a process of its own."""

    def __init__(self, options: argparse.Namespace, model: str, way: str) -> None:
        _require(Path(model) / "genai_config.json", "a directory of onnxruntime-genai's builder")
        python = options.genai_python
        found = shutil.which(python) and subprocess.run([python, "-c", "import onnxruntime_genai"], capture_output=True)
        if not found or found.returncode:
            raise Missing(
                f"--genai-python {python}: expected an interpreter with onnxruntime-genai, found none; {_HOW}"
            )
        program = Path(__file__).with_name("serving_genai.py")
        self._command = [python, str(program), model, "--way", way, "--threads", str(options.threads)]
        self._command += ["--rows", str(options.rows), "--requests", str(options.requests)]

    def measure(self) -> Figures:
        """Run the requests in a new process and return the figures."""
        done = subprocess.run(self._command, capture_output=True, text=True, timeout=_RUN_SECONDS)
        if done.returncode:
            raise SystemExit(f"{' '.join(self._command)}: expected figures, found:\n{done.stderr.strip()[-2000:]}")
        found: Figures = json.loads(done.stdout.splitlines()[-1])
        return found


def _require(path: Path, what: str) -> None:
    if not path.exists():
        raise Missing(f"{path}: expected {what}, found none; {_HOW}")


def make(kind: str, model: str, options: argparse.Namespace) -> HttpServer | Genai:
    """Return the server of a kind. Raises Missing if something that it needs is not there."""
    if kind == "dynexport":
        return Dynexport(options, model)
    if kind == "cpp":
        return CppService(options, model)
    if kind == "llama.cpp":
        return LlamaCpp(options, model)
    if kind in _GENAI_WAYS:
        return Genai(options, model, _GENAI_WAYS[kind])
    raise Missing(f"--peer {kind}: expected dynexport, cpp, llama.cpp, {' or '.join(_GENAI_WAYS)}, found {kind!r}")


def report(found: dict[str, list[Figures]]) -> None:
    """Print a table of medians; the first server is the one that the others are compared with."""
    print("| Server | Tokens/s | Ratio | First token, s: median, 99 % | Between tokens, ms: median, 99 % | Others |")
    print("|---|---|---|---|---|---|")
    ours = next(iter(found.values()))
    for name, rounds in found.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        pairs = zip(ours, rounds, strict=True)
        ratio = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
        others = f"{100 * max(one['others'] for one in rounds):.0f} %"
        print(
            f"| {name} | {middle['tokens_per_second']:.0f} | {ratio:.2f} | {middle['first_median']:.2f}, "
            f"{middle['first_99']:.2f} | {middle['gap_median']:.1f}, {middle['gap_99']:.1f} | {others} |"
        )
    print("Ratio: the first server's tokens/s / this one's, median of the rounds; over 1: the first is faster.")
    print("Others: largest share of the machine that other processes took in a round.")


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="the bundle that `dynexport serve` serves; BUNDLE@2 for a depth")
    parser.add_argument("--peer", action="append", default=[], metavar="KIND=MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpp-service", default="build/cpp/dynexport-serve", help="the built service in C++")
    parser.add_argument("--llama-server", default="llama-server", help="llama.cpp's server")
    parser.add_argument("--llama-option", action="append", default=[], help="a further option of it")
    parser.add_argument("--genai-python", default="python3", help="interpreter that has onnxruntime-genai")
    parser.add_argument("--json", type=Path, help="write the figures of every round")
    options = parser.parse_args()
    asked = [f"dynexport={options.bundle}", *options.peer]
    try:
        servers = {each: make(*_split(each), options) for each in asked}
    except Missing as missing:
        sys.exit(str(missing))
    found: dict[str, list[Figures]] = {name: [] for name in servers}
    for number in range(options.rounds):
        for name, server in servers.items():
            found[name].append(server.measure())
            print(f"round {number + 1}: {name}: {found[name][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    report(found)


def _split(peer: str) -> tuple[str, str]:
    kind, equals, model = peer.partition("=")
    if not equals or not model:
        raise Missing(f"--peer {peer}: expected KIND=MODEL, found {peer!r}")
    return kind, model


if __name__ == "__main__":
    main()
