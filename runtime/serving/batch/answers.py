"""Append answers to a file, a whole line each, and find out which ones a file has that an earlier run began."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.atomic import lock, sync
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.plain_files import kind_of
from dynexport.runtime.serving.batch.lines import Line, bounded_lines
from dynexport.runtime.serving.batch.requests import Requests

# Most bytes of an answer that is read again. It may have 128 choices with log probabilities.
_LONGEST_LINE = 256 << 20
# Seconds between two flushes to the disk: a power cut loses no more. A kill loses nothing that was written.
_FLUSHED_EVERY = 1.0
_ID = re.compile(r"batch_req_([0-9a-f]{12})_([0-9a-f]{12})_([1-9][0-9]{0,17})")


class Answers:
    """The answers to a file of requests, in the order in which they are finished.

    An answer's ``id`` is made of the hash of the requests, the hash of what answers them, and the number of the
    request's line. So the file itself says which lines are answered and what made it.

    Args:
        path: the file, which is created if it is missing. It is locked until ``close``.
        requests: the requests.
        maker: the hash of the bundle and of all settings that change a text, hexadecimal.

    Raises:
        DynexportError: for a file that cannot be written, that another process writes, or that has anything but
            answers to these requests by this maker.
    """

    def __init__(self, path: Path, requests: Requests, maker: str) -> None:
        self._path, self._input = path, requests.path
        self._keys = requests.sha256[:12], maker[:12]
        self._done = bytearray(requests.last + 1)
        self.count = 0
        self._flushed = time.monotonic()
        self._file = _opened(path)
        try:
            if lock(self._file) is False:
                raise DynexportError(f"{path}: expected a file of this process alone, found another one writing it")
            self._resume()
        except BaseException:
            os.close(self._file)
            raise

    def has(self, number: int) -> bool:
        """Return whether the request on a line is answered."""
        return bool(self._done[number])

    def append(self, number: int, custom_id: str | None, response: dict[str, Any] | None, error: Any = None) -> None:
        """Write the answer to the request on a line.

        Args:
            number: the number of the line.
            custom_id: the request's id; None if the line has none.
            response: what the server would answer: ``status_code``, ``request_id`` and ``body``.
            error: what is wrong with the line itself: ``code`` and ``message``.

        Raises:
            DynexportError: when the file cannot be written; it is then as before.
        """
        assert not self._done[number], "a request has one answer"
        fields = {
            "id": f"batch_req_{self._keys[0]}_{self._keys[1]}_{number}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        content = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        start = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(content):
                written += os.write(self._file, memoryview(content)[written:])
            if time.monotonic() - self._flushed >= _FLUSHED_EVERY:
                os.fsync(self._file)
                self._flushed = time.monotonic()
        except OSError as problem:
            os.ftruncate(self._file, start)
            raise DynexportError(f"{self._path}: expected to write an answer, found: {problem.strerror}") from problem
        self._mark(number)

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise DynexportError(f"{self._path}: expected to write answers, found: {error.strerror}") from error
        finally:
            os.close(self._file)

    def _mark(self, number: int) -> None:
        self._done[number] = 1
        self.count += 1

    def _resume(self) -> None:
        """Read the answers of an earlier run, and remove what it wrote of a last line."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            for line in bounded_lines(file, _LONGEST_LINE):
                if not line.whole:
                    os.ftruncate(self._file, line.start)
                    return
                self._mark(self._number(line))

    def _number(self, line: Line) -> int:
        """Return the number of the request that a line of the file answers."""
        where = f"{self._path}: line {line.number}"
        if line.content is None:
            raise DynexportError(f"{where}: expected at most {_LONGEST_LINE} bytes, found more; remove the line")
        fields = parse_json_object(line.content, where, "name another output, or remove the line")
        found = _ID.fullmatch(str(fields.get("id")))
        if found is None:
            raise DynexportError(f"{where}: expected an answer of this command, found another id; name another output")
        if found[1] != self._keys[0]:
            raise DynexportError(
                f"{where}: expected an answer to {self._input}, found one to other requests; name another output"
            )
        if found[2] != self._keys[1]:
            raise DynexportError(
                f"{where}: expected an answer of the same bundle with the same options, found one of another; name "
                "another output"
            )
        number = int(found[3])
        if number >= len(self._done) or self._done[number]:
            raise DynexportError(
                f"{where}: expected one answer for each request, found another for line {number}; remove it"
            )
        return number


def _opened(path: Path) -> int:
    """Open a regular file to read and append; it is created if it is missing."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise DynexportError(f"{path}: expected a file to write answers to, found: {found}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise DynexportError(f"{path}: expected a file to write answers to and to read again, found {kind_of(mode)}")
    sync(path.parent)
    return descriptor


__all__ = ["Answers"]
