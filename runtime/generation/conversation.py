"""A chat over several turns on one cache: each turn feeds only what is new."""

from __future__ import annotations

from collections.abc import Generator as Steps
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from dynexport.runtime.bundle.checks import checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.claim import Claim
from dynexport.runtime.execution.kv_cache import STEP
from dynexport.runtime.generation.model import Model, WantedDepth
from dynexport.runtime.generation.request import Piece
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.generation.stream import Stream
from dynexport.runtime.text.text import NO_VARIABLES


class Conversation:
    """Messages so far, and the cache that holds them.

    A turn's prompt runs in all layers, on top of entries that generated tokens left in the kept layers only
    (docs/routing-contract.md, unified-skip). One turn at a time: a second one, from another thread or beside an answer
    that has not ended, is refused.

    Attributes:
        context: tokens that it has room for.
        messages: what was said so far; of an answer that was left off, what had come.

    Args:
        model: of a bundle with a tokenizer and a chat template.
        system: a system message to begin with, or None.
        variables: further ones of the chat template, as for ``Text.chat``.
    """

    def __init__(self, model: Model, system: str | None = None, variables: Mapping[str, Any] = NO_VARIABLES) -> None:
        checked_kind("model", model, Model, "a Model")
        checked_kind("system", system, str | None, "text or None")
        self._model = model
        self._variables = variables
        self.context = model.bundle.manifest.model.max_length
        self._cache = model.executor.full_cache(1, self.context, room=STEP)
        self._cached: list[int] = []
        self._claim = Claim(
            "conversation: expected one turn at a time, found an answer that has not ended; close it first"
        )
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return int(self._cache.positions[0]) >= self.context

    def say(
        self,
        content: str,
        *,
        depth: WantedDepth,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> Stream:
        """The answer to a user's message, as it comes; arguments and errors as for ``Model.stream``.

        When it is left off or interrupted, even within a step, the conversation goes on from what had come.

        Raises:
            DynexportError: also while the answer of another turn has not ended.
        """
        return Stream(self._turn(content, depth, max_new_tokens, sampling, stop))

    def _turn(
        self, content: str, depth: WantedDepth, max_new_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> Steps[Piece, None, None]:
        with self._claim:
            yield from self._answer(content, depth, max_new_tokens, sampling, stop)

    def _answer(
        self, content: str, depth: WantedDepth, max_new_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> Steps[Piece, None, None]:
        asked = [*self.messages, {"role": "user", "content": content}]
        rendered = self._model.text.chat(asked, variables=self._variables)
        if rendered[: len(self._cached)] != self._cached or len(rendered) == len(self._cached):
            # The template tells earlier turns differently now; begin again at full depth.
            self._cache.rewind(0)
            self._cached = []
        prompt = rendered[len(self._cached) :]
        room = self.context - len(self._cached)
        if len(prompt) > room:
            raise DynexportError(
                f"prompt: expected at most {room} tokens, for which the context of {self.context} still has room, "
                f"found {len(prompt)}; say less, or begin another conversation"
            )
        ids: list[int] = []
        answer = {"role": "assistant", "content": ""}
        stream = self._model.stream(
            [prompt],
            depth=depth,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            cache=self._cache,
            held=[self._cached],
            chat=True,
        )
        state = self._cache.mark(0), self._cached
        try:
            with closing(stream) as pieces:
                for piece in pieces:
                    # Kept up with every token, as the caller may stop listening. The last one has not been fed.
                    state = self._cache.mark(0), rendered + ids
                    self._cached = state[1]
                    self.messages = [*asked, answer]
                    answer["content"] += piece.text
                    ids.append(piece.token)
                    yield piece
        except BaseException:
            mark, self._cached = state
            self._cache.truncate(0, mark)
            raise
