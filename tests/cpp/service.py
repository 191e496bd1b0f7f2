"""The C++ service as a process, seen by tests as the Python server is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from live import AnyServer
from requests_of_tests import CHUNK

from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.settings import HttpSettings

# The option of the service for each bound, and for each field of Settings.
_BOUNDS = {
    "most_bytes": "--max-body",
    "read_seconds": "--read-seconds",
    "request_seconds": "--timeout",
    "drain_seconds": "--drain-seconds",
    "requests": "--max-requests",
    "header_seconds": "--header-seconds",
    "stall_seconds": "--stall-seconds",
}
_SETTINGS = {"rows": "--max-rows", "tokens": "--max-length", "queue": "--queue", "prefix_bytes": "--prefix-cache"}


class Service(AnyServer):
    """The C++ service.

    Args:
        program: the words that start it.
        model: what it serves, as "small".
        http: its bounds.
        log: the file of its output.
        settings: fields of Settings.
    """

    def __init__(self, program: Sequence[str], model: Model, http: HttpSettings, log: Path, **settings: Any) -> None:
        self.model, self._log, self._program = model, log, Path(program[0])
        options = [*(word for name, option in _BOUNDS.items() for word in (option, f"{getattr(http, name):.9f}"))]
        options = [word.rstrip("0").rstrip(".") if word[0].isdigit() else word for word in options]
        for name, value in {"prefix_bytes": 0, **settings}.items():
            options += [_SETTINGS[name], str(value)]
        if http.keys:
            keys = log.with_suffix(".keys")
            keys.write_text("\n".join(http.keys))
            options += ["--api-key-file", str(keys)]
        words = [*program, str(model.bundle.path), "--name", "small", "--port", "0", "--threads", "1"]
        with log.open("w") as file:
            command = [*words, "--chunk", str(CHUNK), *options]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def __enter__(self) -> Service:
        while " at http" not in self.said:
            assert self.process.poll() is None, self.said
            time.sleep(0.005)
        self.address = self.said.split(" at ")[-1].strip()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(30) == 0, self.said
        finally:
            self.process.kill()
        if not any(error):
            assert self.said.count("\n") == 1, "one line and nothing else"

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def has_sanitizer(self) -> bool:
        """Whether it was built with AddressSanitizer, which keeps freed memory."""
        return b"__asan_init" in self._program.read_bytes()

    @property
    def resident(self) -> int:
        """Bytes of its memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def measured(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert found, name
        return sum(found)

    def rows_are_free(self) -> bool:
        busy = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
        for _ in range(400):
            if not any(map(self.measured, busy)):
                return True
            time.sleep(0.01)
        return False
