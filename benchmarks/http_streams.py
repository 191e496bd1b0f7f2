"""Read server-sent events at little cost: keep the bytes while the server runs, and parse them afterwards."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

_END = "[DONE]"


class Stream(asyncio.Protocol):
    """A request and its answer.

    Args:
        request: the bytes to send.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parts: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Keep what came and when."""
        self._parts.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        """End: the server closes after the answer."""
        if not self.ended.done():
            self.ended.set_result(None)

    def parse(self) -> None:
        """Read the answer: status, content, events without the closing one, and the times of those with content."""
        raw = b"".join(part for _, part in self._parts)
        ends = list(accumulate(len(part) for _, part in self._parts))
        head, _, _ = raw.partition(b"\r\n\r\n")
        self.status = int(head.split(b" ", 2)[1]) if head else 0
        self.content, self.events, self.times = b"", list[str](), list[float]()
        place, when, chunked = len(head) + 4, [], b"transfer-encoding: chunked" in head.lower()
        while place < len(raw):
            size = len(raw) - place
            if chunked:
                line = raw.index(b"\r\n", place)
                size, place = int(raw[place:line], 16), line + 2
            self.content += raw[place : place + size]
            place += size
            when.append((len(self.content), self._parts[bisect_left(ends, min(place, len(raw)))][0]))
            place += 2 * chunked
        self._read_events(when)

    def _read_events(self, when: Sequence[tuple[int, float]]) -> None:
        """Read the events; ``when`` has, for growing lengths of the content, when it came."""
        lengths, place = [length for length, _ in when], 0
        for block in self.content.split(b"\n\n"):
            place += len(block) + 2
            if not block.startswith(b"data: ") or block == f"data: {_END}".encode():
                continue
            self.events.append(block[6:].decode())
            if not _is_closing(json.loads(self.events[-1])):
                self.times.append(when[min(bisect_left(lengths, place), len(when) - 1)][1])


def _is_closing(event: dict[str, Any]) -> bool:
    """Return whether an event has figures in place of a token: OpenAI's usage, llama.cpp's last event."""
    return event.get("choices") == [] or event.get("stop") is True


async def send_all(port: int, path: str, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """Send requests at once to this machine's ``port`` and return their answers."""
    loop, streams = asyncio.get_running_loop(), []
    for body in bodies:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        streams.append(Stream(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content))
    await asyncio.gather(*(loop.create_connection(partial(_same, one), "127.0.0.1", port) for one in streams))
    await asyncio.gather(*(stream.ended for stream in streams))
    for stream in streams:
        stream.parse()
    return streams


def _same(stream: Stream) -> Stream:
    return stream


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port


def is_up(port: int, path: str) -> bool:
    """Return whether a server answers with status 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
