"""From prompts to text: a batch of rows that end one by one, streamed as they come."""

from __future__ import annotations

import threading
from collections.abc import Generator as Steps
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_list
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Speedup
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.cache import STEP
from dynexport.runtime.execution.decoder import Tokens
from dynexport.runtime.execution.decoders import AnyCache, open_decoder
from dynexport.runtime.generation.sampling import Sampler, Sampling
from dynexport.runtime.text.text import StopStrings, StreamDecoder, Text

FinishReason = Literal["eos", "stop", "length", "context"]
_GREEDY = Sampling()


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        row: which prompt it continues.
        text: what can be shown now; may be empty while a character or a stop string is incomplete.
        finish_reason: set on a row's last token: "eos", "stop" (a stop string), "length" (max_new_tokens),
            "context" (no room for another token).
    """

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None


@dataclass
class Generation:
    """A finished row. ``ids`` are the generated tokens, an end-of-sequence token included."""

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"


class Stream(Iterator[Piece]):
    """The pieces of a generation as they come; every step runs when a piece of it is asked for.

    Several threads may take from it: each piece goes to one of them.
    """

    def __init__(self, pieces: Steps[Piece, None, None]) -> None:
        self._pieces = pieces
        self._turn = threading.Lock()
        self._closed = False

    def __next__(self) -> Piece:
        with self._turn:
            if self._closed:
                raise StopIteration
            return next(self._pieces)

    def close(self) -> None:
        """End it, after the step that another thread may be running; its cache can then be used by another stream."""
        self._closed = True  # those who wait for their turn are not to take the next step
        with self._turn:
            self._pieces.close()


class Generator:
    """Generates with a bundle.

    Threads may share one: their steps take turns, and each gets what it would get alone. Streams may be taken from in
    any order, too.

    Args:
        bundle: an opened bundle.
        threads: of the engine, for one step; None takes one for every core.
        backend: what runs the graphs.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, *, backend: RunBackend = "onnxruntime") -> None:
        self.bundle = bundle
        self.decoder = open_decoder(bundle, threads, backend=backend)
        self.text = Text.of_bundle(bundle)

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        speedup: str | float | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> list[Generation]:
        """All rows to their end; arguments and errors as for ``stream``."""
        rows = self._checked(prompts)
        done = [Generation(len(prompt)) for prompt in rows]
        pieces = self.stream(
            rows, speedup=speedup, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat
        )
        for piece in pieces:
            row = done[piece.row]
            row.ids.append(piece.token)
            row.text += piece.text
            row.finish_reason = piece.finish_reason or row.finish_reason
        return done

    def stream(
        self,
        prompts: Sequence[Tokens],
        *,
        speedup: str | float | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
        cache: AnyCache | None = None,
        held: Sequence[Tokens] = (),
        chat: bool = False,
    ) -> Stream:
        """Tokens as they come, row by row within a step.

        Args:
            prompts: token ids per row; lengths may differ.
            speedup: a ratio that the bundle declares; 1 is full depth; None as for ``Bundle.speedup``.
            max_new_tokens: at most so many per row.
            sampling: temperature 0 is greedy. A row's draws do not depend on its neighbours.
            stop: strings that end a row; they are not part of its text.
            cache: what earlier turns left, to go on from, which no other stream may use until this one has ended or
                is closed; None begins anew.
            held: with ``cache``: the token ids that it holds, per row, which ``repetition_penalty`` is for as well.
            chat: whether what is generated is an answer in a chat, which ends at more tokens than other text
                (``turn_end`` of the manifest).

        Raises:
            DynexportError: for a prompt that is empty, has unknown tokens or exceeds the context, or a bad argument.
        """
        ids = self._checked(prompts)
        max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
        stop = checked_list("stop", stop, "strings")
        if stop and not self.text.has_tokenizer:
            raise DynexportError(f"stop: expected a bundle with a tokenizer, found none in {self.bundle.path}")
        keep = self.bundle.speedup(speedup)
        tokens = self.bundle.manifest.tokens
        eos = frozenset((*tokens.eos, *tokens.turn_end) if chat else tokens.eos)
        if cache is None:
            longest = max(map(len, ids))
            cache = self.decoder.cache(len(ids), longest + max_new_tokens, room=longest + STEP)
        self.decoder.check_cache(cache)
        rows = [_Row(i, self.text, stop, eos, max_new_tokens) for i in range(len(ids))]
        sampler = Sampler(sampling, len(rows))
        for row, tokens_of_row in (*enumerate(ids), *enumerate(held)):
            sampler.see(row, tokens_of_row)
        return Stream(self._run(cache, ids, rows, keep, sampler))

    def _checked(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """int64 [len] per row. Raises DynexportError where one has what is no token, or there is none."""
        rows = checked_list("prompts", prompts, "prompts, each a list of token ids")
        if not rows:
            raise DynexportError("prompts: expected at least one, found none")
        return [checked_ids("prompt", row, self.bundle.manifest.model.vocab_size) for row in rows]

    def _run(
        self, cache: AnyCache, prompts: Sequence[Tokens], rows: list[_Row], keep: Speedup, sampler: Sampler
    ) -> Steps[Piece, None, None]:
        with cache.streamed:
            logits = np.concatenate(self.decoder.prefill(cache, prompts))
            for row, seen in zip(rows, cache.positions, strict=True):
                row.room = self.bundle.manifest.model.max_length - int(seen)
            yield from self._decode(cache, logits, rows, keep, sampler)

    def _decode(
        self, cache: AnyCache, logits: np.ndarray, rows: list[_Row], keep: Speedup, sampler: Sampler
    ) -> Steps[Piece, None, None]:
        live = np.ones(len(rows), bool)
        while True:
            tokens = sampler(logits)
            for row in rows:
                if live[row.index]:
                    piece = row.push(int(tokens[row.index]))
                    live[row.index] = piece.finish_reason is None
                    yield piece
            if not live.any():
                return
            logits = self.decoder.step(cache, tokens, keep, live)


class _Row:
    """What is left to do for one prompt.

    Attributes:
        room: tokens that the context has room for after the prompt.
    """

    room: int

    def __init__(self, index: int, text: Text, stop: Sequence[str], eos: frozenset[int], new: int) -> None:
        self.index = index
        self._eos = eos
        self._left = new
        self._decoder = StreamDecoder(text) if text.has_tokenizer else None
        self._stops = StopStrings(stop)

    def push(self, token: int) -> Piece:
        """Take one token: what can be shown now, and whether the row ends with it."""
        self._left -= 1
        self.room -= 1
        if token in self._eos:
            return self._end(token, "", "eos")
        text, stopped = self._stops.push(self._decoder.push(token) if self._decoder else "")
        if stopped:
            return Piece(self.index, token, text, "stop")
        if self._left == 0:
            return self._end(token, text, "length")
        if self.room < 0:
            return self._end(token, text, "context")
        return Piece(self.index, token, text, None)

    def _end(self, token: int, text: str, reason: FinishReason) -> Piece:
        """Release what was held back; the rest of the text may still complete a stop string."""
        rest, stopped = self._stops.push(self._decoder.finish() if self._decoder else "")
        text += rest if stopped else rest + self._stops.finish()
        return Piece(self.index, token, text, "stop" if stopped else reason)


__all__ = ["FinishReason", "Generation", "Generator", "Piece", "Stream"]
