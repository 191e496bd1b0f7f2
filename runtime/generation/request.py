"""One request: its generated tokens, its text and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.sampler import Choice, RowSampler
from dynexport.runtime.text.text import StopStrings, StreamDecoder, Text

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of a token before any sampling option is applied.

    Attributes:
        logprob: natural logarithm of the token's probability.
        top: (token id, log probability) of the ``Sampling.logprobs`` most probable tokens, most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        row: the index of the request.
        token: the token's id.
        text: the text that is final now; empty while a character or a stop string is incomplete.
        finish_reason: None before a row's last token; then "stop" for an end-of-sequence token, a stop string or a
            complete text of a schema, "length" for ``max_new_tokens`` or a full context.
        stop_reason: the token id or the stop string that ended the row; None for "length" and for a complete text.
        logprobs: set if ``Sampling.logprobs`` is.
        draft: the id that was drafted in its place, which it equals if the draft was accepted; None without a draft.
    """

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: TokenLogprobs | None = None
    draft: int | None = None


@dataclass
class Generation:
    """A finished row.

    Attributes:
        prompt_tokens: number of tokens in the prompt.
        ids: ids of the generated tokens, including an end-of-sequence token.
        text: the generated text, without special tokens and stop strings.
        finish_reason: as for ``Piece``.
        stop_reason: as for ``Piece``.
        logprobs: one per generated token if ``Sampling.logprobs`` is set, else empty.
    """

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def push(self, piece: Piece) -> None:
        """Append the next token."""
        self.ids.append(piece.token)
        self.text += piece.text
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.stop_reason = piece.stop_reason
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)


class Request:
    """The state of one request while it runs.

    Args:
        index: the request's index and its row in the cache.
        depth: the depth that its tokens run at.
        sampler: chooses its tokens; it has seen the prompt.
        text: the tokenizer that decodes its tokens, if the bundle has one.
        stop: strings that end it; they are not part of its text.
        eos: ids of tokens that end it.
        max_new_tokens: the largest number of tokens to generate.
        room: the number of tokens that fit into the context after the prompt.
    """

    def __init__(
        self,
        index: int,
        depth: Depth,
        sampler: RowSampler,
        text: Text,
        *,
        stop: Sequence[str],
        eos: frozenset[int],
        max_new_tokens: int,
        room: int,
    ) -> None:
        self.index, self.depth, self.sampler = index, depth, sampler
        self._eos, self._left, self._room = eos, max_new_tokens, room
        self._decoder = StreamDecoder(text) if text.has_tokenizer else None
        self._stops = StopStrings(stop) if stop else None

    @property
    def left(self) -> int:
        """Number of tokens that may still be generated; the end of the context may come first."""
        return self._left

    def push(self, choice: Choice) -> Piece:
        """Add a token and return its piece: the text that is final now, and whether the request ends."""
        token = choice.token
        self._left -= 1
        self._room -= 1
        if token in self._eos:
            return self._end(choice, "", "stop", token)
        text = self._decoder.push(token) if self._decoder else ""
        if self._stops is not None:
            text, stopped = self._stops.push(text)
            if stopped:
                return self._piece(choice, text, "stop", self._stops.found)
        if self.sampler.is_complete:
            return self._end(choice, text, "stop", None)
        if self._left == 0 or self._room < 0:
            return self._end(choice, text, "length", None)
        return self._piece(choice, text, None, None)

    def _end(self, choice: Choice, text: str, reason: FinishReason, stop_reason: int | None) -> Piece:
        """Return the last piece with all text that was held back; that text may complete a stop string."""
        rest = self._decoder.finish() if self._decoder else ""
        if self._stops is not None:
            rest, stopped = self._stops.push(rest)
            if stopped:
                return self._piece(choice, text + rest, "stop", self._stops.found)
            rest += self._stops.finish()
        return self._piece(choice, text + rest, reason, stop_reason)

    def _piece(self, choice: Choice, text: str, reason: FinishReason | None, stop_reason: int | str | None) -> Piece:
        logprobs = None if choice.logprob is None else TokenLogprobs(choice.logprob, choice.top)
        return Piece(self.index, choice.token, text, reason, stop_reason, logprobs)


__all__ = ["FinishReason", "Generation", "Piece", "Request", "TokenLogprobs"]
