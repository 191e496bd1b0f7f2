"""Send a server ten thousand requests, many cancelled, broken or refused: no wrong text, no lost row, flat memory.

    python benchmarks/soak.py BUNDLE --requests 10000 --concurrent 64

Starts ``dynexport serve`` with the bundle, which needs a tokenizer. Each request is drawn with a fixed seed: whole,
streamed, sampled, two answers, hung up, refused for its body, its parameters or its length. Texts at temperature 0, and
those that are sampled with a seed, are compared with ``Model.generate`` alone. Prints what came back, the rows and
requests that the server still holds, its memory after the first thousand and at the end, and exits with 1 if a text is
wrong, a request is lost, a row is leaked, or memory grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from http_streams import free_port, is_up

from dynexport.runtime.execution.batch import EvenChunks
from dynexport.runtime.generation.model import Model, load
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.settings import CHUNK

# A request's body and the text of its answer.
Case = tuple[dict[str, Any], str]
WORDS = (
    "river",
    "runs",
    "past",
    "old",
    "stone",
    "bridges",
    "while",
    "people",
    "talk",
    "about",
    "rain",
    "bread",
    "home",
)
# Kind of request -> its weight, and the status that it must have; None for a request that hangs up.
KINDS: dict[str, tuple[int, int | None]] = {
    "whole": (32, 200),
    "streamed": (25, 200),
    "two answers": (5, 200),
    "hung up in the stream": (12, None),
    "hung up at once": (8, None),
    "invalid JSON": (5, 400),
    "an unknown field": (3, 400),
    "a parameter out of range": (4, 400),
    "an unknown model": (3, 404),
    "beyond the context": (3, 400),
}
OUT_OF_RANGE: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0},
    {"max_tokens": 10**9},
    {"temperature": -1},
    {"top_p": 2},
    {"n": 10**6},
    {"depth": "deepest"},
    {"prompt": []},
    {"logit_bias": {"banana": 1}},
    {"stop": [""] * 100},
)
# Full after a few hundred requests, so that it does not count as growth.
_PREFIX_CACHE = "16M"
_START_SECONDS, _ANSWER_SECONDS, _MOST_GROWTH = 120, 120, 1.02


def cases(model: Model, name: str, count: int) -> list[Case]:
    """Return request bodies with the text that each must give; a third of them is sampled with a seed."""
    rng = random.Random(1)
    depths = ["full", *(depth.name for depth in model.bundle.manifest.depths)]
    found = []
    for index in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        tokens, depth = rng.randint(1, 24), rng.choice(depths)
        options = {"temperature": 0.8, "top_k": 20, "seed": index} if index % 3 == 0 else {"temperature": 0}
        sampling = Sampling(**options)
        text = model.generate(
            prompt, max_new_tokens=tokens, depth=depth, sampling=sampling, chunk=EvenChunks(CHUNK)
        ).text
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "depth": depth, "top_p": 1, **options}
        found.append((body, text))
    return found


class Wrong(Exception):
    """An answer that differs from the one that the request must have."""


class Client:
    """Sends random requests and counts what comes back.

    Attributes:
        counts: number of requests of each kind.
        wrong: what was wrong, by its kind.
    """

    def __init__(self, address: str, known: list[Case], longest: int) -> None:
        self._http = httpx.AsyncClient(
            base_url=address,
            timeout=_ANSWER_SECONDS,
            # Idle connections end here before the server ends them, which it may do as a request arrives.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2),
        )
        self._known, self._longest = known, longest
        self._rng = random.Random(2)
        self.counts: Counter[str] = Counter()
        self.wrong: dict[str, list[str]] = {"wrong": [], "lost": []}

    async def run(self, count: int, concurrent: int) -> None:
        """Send requests, some at a time."""
        numbers = iter(range(count))

        async def several() -> None:
            for _ in numbers:
                await self._one()

        await asyncio.gather(*(several() for _ in range(concurrent)))

    async def _one(self) -> None:
        """Send a request of a random kind."""
        kind = self._rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        body, text = self._rng.choice(self._known)
        number, odd = self._rng.randint(0, 8), self._rng.choice(OUT_OF_RANGE)
        self.counts[kind] += 1
        try:
            if kind in ("streamed", "hung up in the stream"):
                await self._stream(body, text, None if kind == "streamed" else max(1, number))
            elif kind == "hung up at once":
                await self._hang_up(body, number / 200)
            else:
                await self._whole(kind, body, text, odd)
        except Wrong as error:
            self.wrong["wrong"].append(f"{kind}: {error}; {json.dumps(body)}"[:600])
        except (httpx.HTTPError, ValueError) as error:
            self.wrong["lost"].append(f"{kind}: {type(error).__name__}: {error}; {json.dumps(body)}"[:600])

    async def _whole(self, kind: str, body: dict[str, Any], text: str, odd: dict[str, Any]) -> None:
        changes: dict[str, dict[str, Any]] = {
            "two answers": {"n": 2, "temperature": 0},
            "an unknown field": {"banana": 1},
            "a parameter out of range": odd,
            "an unknown model": {"model": "nobody"},
            "beyond the context": {"prompt": "river " * self._longest},
        }
        content = json.dumps(body | changes.get(kind, {}))
        if kind == "invalid JSON":
            content = content[:-2]
        answer = await self._http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        expected = KINDS[kind][1]
        if answer.status_code != expected:
            raise Wrong(f"{odd}: expected status {expected}, found {answer.status_code}: {answer.text:.200}")
        found = answer.json()
        if expected != 200:
            if not found["error"]["message"]:
                raise Wrong("expected a message, found none")
            return
        texts = [choice["text"] for choice in found["choices"]]
        if kind == "two answers":
            same = len(texts) == 2 and texts[0] == texts[1] and (body["temperature"] or texts[0] == text)
        else:
            same = texts == [text]
        if not same:
            raise Wrong(f"expected {text!r}, found {texts!r}")

    async def _stream(self, body: dict[str, Any], text: str, events: int | None) -> None:
        """Read a stream to its end, or hang up after some events."""
        found, seen, done = "", 0, False
        async with self._http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                raise Wrong(f"expected status 200, found {answer.status_code}")
            async for line in answer.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: ") or done:
                    continue
                found += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                seen += 1
                if seen == events:
                    return
        if not done:
            raise ValueError("expected data: [DONE], found the stream's end")
        if found != text:
            raise Wrong(f"expected {text!r}, found {found!r}")

    async def _hang_up(self, body: dict[str, Any], seconds: float) -> None:
        sending = asyncio.create_task(self._http.post("/v1/completions", json=body))
        await asyncio.sleep(seconds)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    async def gauge(self, name: str) -> float:
        """Return a metric of the server, the sum over models."""
        text = (await self._http.get("/metrics")).text
        found = re.findall(rf"^\S*{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        if not found:
            sys.exit(f"/metrics: expected {name}, found none; pip install prometheus-client")
        return sum(map(float, found))


@contextmanager
def serving(bundle: Path, threads: int) -> Iterator[tuple[str, int]]:
    """Run a server until the block ends; yield its address and process id."""
    port = free_port()
    command = [sys.executable, "-m", "dynexport", "serve", str(bundle), "--name", "model", "--port", str(port)]
    command += ["--prefix-cache", _PREFIX_CACHE]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, "--threads", str(threads)], stdout=log, stderr=subprocess.STDOUT)
        try:
            begun = time.monotonic()
            while not is_up(port, "/ready"):
                if server.poll() is not None or time.monotonic() - begun > _START_SECONDS:
                    log.seek(0)
                    sys.exit(f"dynexport serve: expected a running server, found:\n{log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            server.terminate()
            code = server.wait(60)
            log.seek(0)
            print(f"the server ended with {code} and had written:", log.read().decode()[-2000:].strip(), sep="\n")


def memory(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024


async def soak(address: str, pid: int, known: list[Case], longest: int, options: argparse.Namespace) -> bool:
    """Send the requests, print what happened, and return whether all was right."""
    client, begun = Client(address, known, longest), time.perf_counter()
    resident, warm = [], min(1000, options.requests // 2)
    for count in (warm, options.requests - warm):
        await client.run(count, options.concurrent)
        await asyncio.sleep(1)  # rows of clients that hung up last
        resident.append(memory(pid))
    seconds = time.perf_counter() - begun
    held = {name: await client.gauge(name) for name in ("num_requests_running", "num_requests_waiting")}
    growth = resident[1] / resident[0]
    print(f"{options.requests} requests, {options.concurrent} at a time, {seconds:.0f} s: {dict(client.counts)}")
    print(f"{len(client.wrong['wrong'])} wrong, {len(client.wrong['lost'])} lost, held at the end: {held}")
    print(f"memory: {resident[0] / 2**20:.1f} MiB after {warm}, {resident[1] / 2**20:.1f} at the end: {growth:.4f}x")
    for kind, lines in client.wrong.items():
        for line in lines[:10]:
            print(f"{kind}: {line}")
    return not any(client.wrong.values()) and not any(held.values()) and growth <= _MOST_GROWTH


def main() -> None:
    """Start a server, send the requests and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    model = load(options.bundle, threads=1)
    known, longest = cases(model, "model", 60), model.bundle.manifest.model.max_length
    with serving(options.bundle, options.threads) as (address, pid):
        right = asyncio.run(soak(address, pid, known, longest, options))
    sys.exit(not right)


if __name__ == "__main__":
    main()
