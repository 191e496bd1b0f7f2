"""Send a server ten thousand requests, many cancelled, broken or refused: no wrong text, no lost row, flat memory.

    python benchmarks/soak.py BUNDLE --requests 10000 --concurrent 64

Starts ``dynexport serve`` with the bundle, which needs a tokenizer. Each request is drawn at random: complete,
streamed, streamed and hung up after some events, hung up at once, invalid JSON, an unknown field, an unknown model, or
a prompt beyond the context. Texts at temperature 0 are compared with those of ``Model.generate`` alone. Prints counts,
the server's memory after the first tenth and at the end, and exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from dynexport.runtime.generation.model import Model, load
from dynexport.runtime.serving.settings import CHUNK

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
    "complete": (40, 200),
    "streamed": (25, 200),
    "hung up in the stream": (12, None),
    "hung up at once": (8, None),
    "invalid JSON": (5, 400),
    "an unknown field": (4, 400),
    "an unknown model": (3, 404),
    "beyond the context": (3, 400),
}


def cases(model: Model, name: str, count: int) -> list[Case]:
    """Return request bodies with the text that each must give."""
    rng = random.Random(1)
    depths = ["full", *(depth.name for depth in model.bundle.manifest.depths)]
    found = []
    for _ in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        tokens, depth = rng.randint(1, 24), rng.choice(depths)
        text = model.generate(prompt, max_new_tokens=tokens, depth=depth, chunk=CHUNK).text
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "depth": depth}
        found.append((body, text))
    return found


class Client:
    """Sends random requests and counts what comes back."""

    def __init__(self, address: str, known: list[Case], longest: int) -> None:
        self._http = httpx.AsyncClient(
            base_url=address, timeout=120, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
        )
        self._known, self._longest = known, longest
        self._rng = random.Random(2)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def one(self) -> None:
        """Send a request of a random kind."""
        kind = self._rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        body, text = self._rng.choice(self._known)
        try:
            await self._send(kind, dict(body), text, self._rng.randint(0, 8))
        except (httpx.HTTPError, AssertionError, ValueError) as error:
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        self.counts[kind] += 1

    async def _send(self, kind: str, body: dict[str, Any], text: str, events: int) -> None:
        expected = KINDS[kind][1]
        if kind in ("streamed", "hung up in the stream"):
            await self._stream(body, text, None if kind == "streamed" else events)
            return
        if kind == "hung up at once":
            sending = asyncio.create_task(self._http.post("/v1/completions", json=body))
            await asyncio.sleep(events / 200)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            return
        content = json.dumps(body)
        if kind == "invalid JSON":
            content = content[:-2]
        elif kind == "an unknown field":
            content = json.dumps(body | {"banana": 1})
        elif kind == "an unknown model":
            content = json.dumps(body | {"model": "nobody"})
        elif kind == "beyond the context":
            content = json.dumps(body | {"prompt": "river " * self._longest})
        answer = await self._http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        while answer.status_code == 429:
            await asyncio.sleep(0.05)
            answer = await self._http.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
        assert answer.status_code == expected, f"expected {expected}, found {answer.status_code}: {answer.text:.200}"
        if expected == 200:
            found = answer.json()["choices"][0]["text"]
            assert found == text, f"expected {text!r}, found {found!r}"
        else:
            assert answer.json()["error"]["message"]

    async def _stream(self, body: dict[str, Any], text: str, events: int | None) -> None:
        found, seen = "", 0
        async with self._http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            if answer.status_code == 429:
                self.counts["refused: the queue is full"] += 1
                return
            assert answer.status_code == 200, f"expected 200, found {answer.status_code}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                found += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                seen += 1
                if events is not None and seen >= events:
                    return
        assert found == text, f"expected {text!r}, found {found!r}"

    async def run(self, count: int, concurrent: int) -> None:
        """Send requests, some at a time."""
        numbers = iter(range(count))

        async def several() -> None:
            for _ in numbers:
                await self.one()

        await asyncio.gather(*(several() for _ in range(concurrent)))

    async def gauge(self, name: str) -> float:
        """Return a metric of the server."""
        text = (await self._http.get("/metrics")).text
        found = re.search(rf"^\S*{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"/metrics: expected {name}, found none"
        return float(found[1])


def memory(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024


async def soak(address: str, pid: int, known: list[Case], longest: int, count: int, concurrent: int) -> list[str]:
    """Send the requests, print what happened, and return what was wrong."""
    client = Client(address, known, longest)
    begun = time.perf_counter()
    await client.run(count // 10, concurrent)
    early = memory(pid)
    await client.run(count - count // 10, concurrent)
    seconds = time.perf_counter() - begun
    await asyncio.sleep(1)  # rows of clients that hung up last
    late = memory(pid)
    left = {name: await client.gauge(name) for name in ("num_requests_running", "num_requests_waiting")}
    print(f"{count} requests, {concurrent} at a time, {seconds:.0f} s: {dict(client.counts)}")
    print(f"memory {early / 2**20:.1f} MiB after {count // 10}, {late / 2**20:.1f} MiB at the end: {late / early:.4f}x")
    wrong = client.wrong + [f"{name}: expected 0, found {value}" for name, value in left.items() if value]
    return wrong + ([f"memory grew {late / early:.3f}x"] if late > 1.02 * early else [])


def main() -> None:
    """Start a server, send the requests and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--concurrent", type=int, default=64)
    options = parser.parse_args()
    model = load(options.bundle, threads=1)
    known = cases(model, options.bundle.name, 60)
    command = [sys.executable, "-m", "dynexport", "serve", options.bundle, "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        address = ""
        for line in server.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                address = found[0]
                break
        try:
            longest = model.bundle.manifest.model.max_length
            wrong = asyncio.run(soak(address, server.pid, known, longest, options.requests, options.concurrent))
        finally:
            server.terminate()
    for line in wrong[:20]:
        print("wrong:", line)
    print(f"{len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
