"""The C interface of the C++ runtime, called as any language calls C."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Ids = c.POINTER(c.c_int64)
ROUTE_ERROR, CANCELLED = 3, 4


class Backend(c.Structure):
    """dynexport_backend."""

    _fields_ = (
        ("size", c.c_size_t),
        *((name, c.c_char_p) for name in ("kind", "library", "plugins")),
        *((name, c.c_int32) for name in ("threads", "trust_engines")),
        ("weights", c.c_char_p),
    )


class Options(c.Structure):
    """dynexport_options."""

    _fields_ = (
        ("size", c.c_size_t),
        ("max_new_tokens", c.c_int64),
        ("depth", c.c_char_p),
        *((name, c.c_int32) for name in ("chat", "has_seed")),
        ("seed", c.c_uint64),
        *((name, c.c_double) for name in ("temperature", "top_p", "min_p", "typical_p")),
        *((name, c.c_double) for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")),
        *((name, c.c_int64) for name in ("top_k", "min_new_tokens", "no_repeat_ngram_size")),
        *(("stop", c.POINTER(c.c_char_p)), ("stop_count", c.c_size_t)),
        *(("stop_ids", Ids), ("stop_ids_count", c.c_size_t)),
        *(("bias_ids", Ids), ("biases", c.POINTER(c.c_double)), ("bias_count", c.c_size_t)),
        ("logprobs", c.c_int32),
        *(("speculate", c.c_int64), ("draft", c.c_char_p)),
    )


class Token(c.Structure):
    """dynexport_token."""

    _fields_ = (
        ("size", c.c_size_t),
        ("id", c.c_int64),
        ("text", c.c_char_p),
        ("text_bytes", c.c_size_t),
        ("layers", c.c_int64),
        ("logprob", c.c_double),
        ("finish", c.c_int32),
    )


OnToken = c.CFUNCTYPE(c.c_int, c.c_void_p, c.POINTER(Token))


class Refused(Exception):
    """A status other than good, and the thread's last error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Answer:
    """The tokens of a generation."""

    ids: list[int]
    text: str
    layers: list[int]
    logprobs: list[float]
    finish: int


class Library:
    """The shared library."""

    def __init__(self, path: Path) -> None:
        self.c = c.CDLL(str(path))
        self.c.dynexport_last_error.restype = c.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises Refused when its status is not good."""
        status = getattr(self.c, f"dynexport_{name}")(*arguments)
        if status:
            raise Refused(status, self.c.dynexport_last_error().decode())

    def options(self, **fields: Any) -> Options:
        found = Options()
        self.call("options_init", c.byref(found), c.c_size_t(c.sizeof(found)))
        for name, value in fields.items():
            setattr(found, name, value)
        return found

    def open(self, bundle: Path, **fields: Any) -> Opened:
        backend, model = Backend(), c.c_void_p()
        self.call("backend_init", c.byref(backend), c.c_size_t(c.sizeof(backend)))
        for name, value in fields.items():
            setattr(backend, name, value)
        self.call("open", str(bundle).encode(), c.byref(backend), c.byref(model))
        return Opened(self, model)


class Opened:
    """A loaded bundle."""

    def __init__(self, library: Library, model: c.c_void_p) -> None:
        self.library, self.model = library, model

    def close(self) -> None:
        self.library.call("close", self.model)

    def number(self, name: str) -> int:
        found = c.c_int64()
        self.library.call(name, self.model, c.byref(found))
        return found.value

    def depths(self) -> list[str]:
        found: list[str] = []
        name = c.c_char_p()
        while True:
            self.library.call("depth_name", self.model, c.c_size_t(len(found)), c.byref(name))
            if name.value is None:
                return found
            found.append(name.value.decode())

    def ids(self, name: str, *arguments: Any) -> list[int]:
        """The ids that encode or chat gives."""
        ids, count = Ids(), c.c_size_t()
        self.library.call(name, self.model, *arguments, c.byref(ids), c.byref(count))
        found = ids[: count.value]
        self.library.call("free", ids)
        return found

    def encode(self, text: str) -> list[int]:
        return self.ids("encode", text.encode(), c.c_size_t(len(text.encode())))

    def decode(self, ids: Sequence[int]) -> str:
        text, size = c.c_void_p(), c.c_size_t()
        self.library.call(
            "decode", self.model, (c.c_int64 * len(ids))(*ids), c.c_size_t(len(ids)), c.byref(text), c.byref(size)
        )
        found = c.string_at(text, size.value + 1)
        self.library.call("free", text)
        assert found[-1:] == b"\0"
        return found[:-1].decode()

    def generate(self, prompt: Sequence[int], go_on: Callable[[int], bool] = lambda _: True, **fields: Any) -> Answer:
        answer = Answer([], "", [], [], 0)

        def receive(_: Any, token: Any) -> int:
            piece = token.contents
            assert piece.size == c.sizeof(Token)
            answer.ids.append(piece.id)
            answer.text += c.string_at(piece.text, piece.text_bytes).decode()
            answer.layers.append(piece.layers)
            answer.logprobs.append(piece.logprob)
            answer.finish = piece.finish
            return 0 if go_on(len(answer.ids)) else 1

        options, ids = self.library.options(**fields), (c.c_int64 * len(prompt))(*prompt)
        self.library.call(
            "generate", self.model, ids, c.c_size_t(len(prompt)), c.byref(options), OnToken(receive), None
        )
        return answer
