"""The child process that renders chat templates: started at first use, limited, replaced after a failure."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynexport.runtime.text import template_process

_WAIT = 10  # how many times the CPU time a render may take altogether
_PIECE = 1 << 16


class RenderError(Exception):
    """A template that failed, or exceeded its time or memory."""


class RenderProcess:
    """Renders templates one at a time in a child process (``template_process``), which several threads may share.

    The child ends with this object, with the process, and when a template fails in a way that may leave it damaged;
    the next render starts another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(self, template: str, variables: Mapping[str, Any], seconds: int) -> str:
        """Return the rendered text.

        Args:
            template: the template's text.
            variables: its variables, as JSON values.
            seconds: limit of CPU time.

        Raises:
            RenderError: when the template fails, or exceeds its time or memory.
            OSError: when the child cannot be started or does not answer; TimeoutError after ten times the CPU time.
        """
        request = json.dumps({"seconds": seconds, "template": template, "variables": variables}).encode() + b"\n"
        with self._lock:
            child = self._started()
            kept = False
            try:
                answer = child.ask(request, _WAIT * seconds)
                kept = answer is not None and not answer.get("last")
            finally:  # an interrupted request would leave its answer to the next one
                if not kept:
                    self._end()
        if answer is None:
            # Killed at a limit, mostly before it could report it.
            raise RenderError(f"it takes more than {seconds} s, or too much memory")
        if "error" in answer:
            raise RenderError(str(answer["error"]))
        return str(answer["text"])

    def _started(self) -> _Child:
        """Return the running child, or a new one after a fork, a failure or a kill."""
        if self._child is not None and not self._child.alive:
            self._end()
        if self._child is None:
            self._child = _Child.start()
            self._stop = weakref.finalize(self, self._child.end)
        return self._child

    def _end(self) -> None:
        self._child = None
        self._stop()


@dataclass(frozen=True)
class _Child:
    """A started child.

    Attributes:
        process: the child.
        socket: its standard input and output.
        owner: id of the process that started it; a fork of that must leave it alone.
    """

    process: subprocess.Popen[bytes]
    socket: socket.socket
    owner: int

    @classmethod
    def start(cls) -> _Child:
        ours, its = socket.socketpair()
        with its:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", template_process.__file__, *_packages()],
                    stdin=its,
                    stdout=its,
                    stderr=subprocess.DEVNULL,
                )
            except BaseException:
                ours.close()
                raise
        return cls(process, ours, os.getpid())

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, request: bytes, seconds: float) -> dict[str, Any] | None:
        """Send a request and return the answer, or None if the child ended without one."""
        self.socket.settimeout(seconds)
        pieces = []
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(request)
            while piece := self.socket.recv(_PIECE):
                pieces.append(piece)
                if piece.endswith(b"\n"):
                    break
        try:
            answer: dict[str, Any] = json.loads(b"".join(pieces))
        except ValueError:
            return None
        return answer

    def end(self) -> None:
        """Kill the child and wait for its end."""
        self.socket.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


def _packages() -> list[str]:
    """Return the directories that the child imports Jinja from."""
    found = [spec.origin for name in ("jinja2", "markupsafe") if (spec := find_spec(name)) and spec.origin]
    return sorted({str(Path(origin).parent.parent) for origin in found})


__all__ = ["RenderError", "RenderProcess"]
