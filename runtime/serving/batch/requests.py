"""Read a file of requests, in OpenAI's batch form: one JSON object with an id, a URL and a body per line."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.plain_files import open_plain
from dynexport.runtime.serving.batch.lines import Line, bounded_lines

# Most bytes of a line.
LONGEST_LINE = 8 << 20
Url: TypeAlias = Literal["/v1/chat/completions", "/v1/completions"]


class BadLine(DynexportError):
    """A line that is no request.

    Attributes:
        custom_id: the line's id, if it has a valid one.
    """

    def __init__(self, message: str, custom_id: str | None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


class BatchRequest(BaseModel):
    """One line of the file.

    Attributes:
        custom_id: the client's id of the request, 1 to 512 characters.
        method: "POST".
        url: the server's path that the body is for.
        body: the request, as for the server.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Url
    body: dict[str, Any]


@dataclass(frozen=True)
class Requests:
    """A file of requests that was read once.

    Attributes:
        path: the file.
        sha256: the hash of its content, hexadecimal.
        count: number of requests: lines that are not blank.
        last: number of its last line.
    """

    path: Path
    sha256: str
    count: int
    last: int

    @classmethod
    def scan(cls, path: Path) -> Requests:
        """Read a file from end to end and check that no two requests have the same id.

        The memory needed is 32 bytes per line.

        Raises:
            DynexportError: for a file that cannot be read, or with an id that an earlier line has.
        """
        ids, numbers, count, last, digest = array("Q"), array("Q"), 0, 0, hashlib.sha256()
        with open_plain(path, "a file of requests", advice="a pipe cannot be read again to resume") as file:
            for line in bounded_lines(file, LONGEST_LINE):
                last = line.number
                if is_blank(line):
                    continue
                count += 1
                if (custom_id := _custom_id(line)) is not None:
                    ids.frombytes(hashlib.blake2b(custom_id.encode(), digest_size=16).digest())
                    numbers.append(line.number)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
        _check_unique(path, np.array(ids, np.uint64).reshape(-1, 2), np.array(numbers, np.int64))
        return cls(path, digest.hexdigest(), count, last)

    def lines(self) -> Iterator[Line]:
        """Read the file again and yield the lines that are not blank.

        Raises:
            DynexportError: for a file that cannot be read, or that has changed since it was scanned.
        """
        with open_plain(self.path, "a file of requests") as file:
            before = os.fstat(file.fileno())
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise self._changed()
            file.seek(0)
            for line in bounded_lines(file, LONGEST_LINE):
                now = os.fstat(file.fileno())
                if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise self._changed()
                if not is_blank(line):
                    yield line

    def _changed(self) -> DynexportError:
        return DynexportError(f"{self.path}: expected the same requests until the end, found the file changed")


def is_blank(line: Line) -> bool:
    """Return whether a line has nothing but white space."""
    return line.content is not None and not line.content.strip()


def parse_request(line: Line) -> BatchRequest:
    """Return the request of a line.

    Raises:
        BadLine: for a line that is too long, no JSON object, or has a missing, wrong or unknown field.
    """
    where = f"line {line.number}"
    if line.content is None:
        raise BadLine(f"{where}: expected at most {LONGEST_LINE} bytes, found more", None)
    try:
        fields = parse_json_object(line.content, where)
    except DynexportError as error:
        raise BadLine(str(error), None) from error
    try:
        return BatchRequest.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        custom_id = None if any(each["loc"] == ("custom_id",) for each in error.errors()) else fields["custom_id"]
        raise BadLine(f"{where}: {name}: {problem['msg']}", custom_id) from error


def _custom_id(line: Line) -> str | None:
    try:
        return parse_request(line).custom_id
    except BadLine as error:
        return error.custom_id


def _check_unique(path: Path, ids: np.ndarray, numbers: np.ndarray) -> None:
    """Raise DynexportError for the first line whose id, uint64 [lines, 2], an earlier line has."""
    order = np.lexsort((ids[:, 0], ids[:, 1]))  # stable: equal ids keep the order of their lines
    ids, numbers = ids[order], numbers[order]
    again = np.flatnonzero((ids[1:] == ids[:-1]).all(axis=1))
    if len(again):
        first = again[np.argmin(numbers[again + 1])]
        raise DynexportError(
            f"{path}: line {numbers[first + 1]}: expected a custom_id of its own, found that of line {numbers[first]}; "
            "answers could not be told apart"
        )


__all__ = ["LONGEST_LINE", "BadLine", "BatchRequest", "Requests", "Url", "is_blank", "parse_request"]
