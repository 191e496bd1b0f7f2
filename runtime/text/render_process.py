"""The process that renders chat templates: started at the first render, limited, replaced after its end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynexport.runtime.bundle.limited_process import import_paths
from dynexport.runtime.text import template_process

_AT_A_TIME = 4  # renders; others wait
_PIECE = 1 << 16  # bytes
_LONGEST = 12 * template_process.CHARACTERS + _PIECE  # bytes of an answer, whose characters are escaped


class RenderError(Exception):
    """A template that failed, or exceeded its time or memory."""


class RenderProcess:
    """Renders templates in another process (``template_process``), each time in a fork of it; threads may share it.

    It ends with this object, or with this process.

    Args:
        templates: template text by name.
        seconds: limit of CPU time of a render.
    """

    def __init__(self, templates: Mapping[str, str], seconds: int) -> None:
        self._templates, self._seconds = dict(templates), seconds
        self._starting, self._renders = threading.Lock(), threading.BoundedSemaphore(_AT_A_TIME)
        self._process: _Process | None = None
        self._end: Callable[[], object] = lambda: None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Return the rendered text.

        Args:
            template: the template's name.
            variables: its variables, as JSON values.

        Raises:
            RenderError: when the template fails, or exceeds its time or memory.
            OSError: when the process cannot be started, or does not answer.
        """
        request = json.dumps({"template": template, "variables": variables}).encode()
        longest = (template_process.WAIT + 1) * self._seconds
        with self._renders:
            process = self._started()
            answer = process.ask(request, longest)
            if not answer and not process.alive:  # it ended with the request in its queue
                answer = self._started().ask(request, longest)
        if "error" in answer:
            raise RenderError(str(answer["error"]))
        if "text" not in answer:
            # Killed at a limit, mostly before it could report it.
            raise RenderError(f"it takes more than {self._seconds} s, or too much memory")
        return str(answer["text"])

    def _started(self) -> _Process:
        """Return the running process; a new one if it has ended, or in a fork of the process that started it."""
        with self._starting:
            if self._process is None or not self._process.alive:
                self._end()
                self._process = _Process.start(self._templates, self._seconds)
                self._end = weakref.finalize(self, self._process.end)
            return self._process


@dataclass(frozen=True)
class _Process:
    """A started process.

    Attributes:
        process: the process.
        control: takes a socket for each request.
        owner: id of the process that started it; a fork of that must leave it alone.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    owner: int

    @classmethod
    def start(cls, templates: Mapping[str, str], seconds: int) -> _Process:
        path = import_paths(("jinja2", "markupsafe"))
        setup = json.dumps({"path": path, "seconds": seconds, "templates": templates}).encode()
        ours, its = socket.socketpair()
        with its:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", template_process.__file__, str(its.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
            )
        started = cls(process, ours, os.getpid())
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it has ended: requests will say so
            stdin.write(setup)
        return started

    @property
    def alive(self) -> bool:
        """Return whether the process takes requests; false in a fork of the process that started it.

        A killed process stops taking them before it can be waited for, so its end of ``control`` is asked.
        """
        if self.owner != os.getpid():
            return False
        try:
            return bool(self.control.recv(1, socket.MSG_DONTWAIT))
        except BlockingIOError:  # open: it never writes there
            return True
        except ConnectionError:
            return False

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Send a request and return the answer, which is empty if the process ended without one.

        Raises:
            OSError: after ``seconds`` without progress, or for an answer that is too long.
        """
        ours, its = socket.socketpair()
        with ours:
            ours.settimeout(seconds)
            with contextlib.suppress(ConnectionError):  # it ended before it read everything
                with its:
                    socket.send_fds(self.control, [b"r"], [its.fileno()])
                ours.sendall(request)
                ours.shutdown(socket.SHUT_WR)
            answer = bytearray()
            with contextlib.suppress(ConnectionError):
                while piece := ours.recv(_PIECE):
                    answer += piece
                    if len(answer) > _LONGEST:
                        raise OSError("its answer is too long")
        try:
            found = json.loads(answer)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def end(self) -> None:
        """End the process and wait for it."""
        self.control.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


__all__ = ["RenderError", "RenderProcess"]
