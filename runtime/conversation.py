"""A chat over several turns on one cache: each turn feeds only what is new."""

from __future__ import annotations

from collections.abc import Generator as Steps

from dynexport.runtime.checks import checked_kind
from dynexport.runtime.claim import Claim
from dynexport.runtime.generate import Generator, Piece, Stream
from dynexport.runtime.sampling import Sampling


class Conversation:
    """Messages so far, and the cache that holds them.

    A turn's prompt runs in all layers, on top of entries that generated tokens left in the kept layers only
    (docs/routing-contract.md, unified-skip). One turn at a time: a second one, from another thread or beside an answer
    that has not ended, is refused.

    Args:
        generator: of a bundle with a tokenizer and a chat template.
        system: a system message to begin with, or None.
    """

    def __init__(self, generator: Generator, system: str | None = None) -> None:
        checked_kind("generator", generator, Generator, "a Generator")
        checked_kind("system", system, str | None, "text or None")
        self._generator = generator
        self._cache = generator.decoder.cache(1, generator.bundle.manifest.model.max_length)
        self._cached: list[int] = []
        self._claim = Claim(
            "conversation: expected one turn at a time, found an answer that has not ended; close it first"
        )
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, content: str, *, speedup: str | float | None, max_new_tokens: int, sampling: Sampling) -> Stream:
        """The answer to a user's message, as it comes; arguments and errors as for ``Generator.stream``.

        Raises:
            DynexportError: also while the answer of another turn has not ended.
        """
        return Stream(self._turn(content, speedup, max_new_tokens, sampling))

    def _turn(
        self, content: str, speedup: str | float | None, max_new_tokens: int, sampling: Sampling
    ) -> Steps[Piece, None, None]:
        with self._claim:
            yield from self._answer(content, speedup, max_new_tokens, sampling)

    def _answer(
        self, content: str, speedup: str | float | None, max_new_tokens: int, sampling: Sampling
    ) -> Steps[Piece, None, None]:
        asked = [*self.messages, {"role": "user", "content": content}]
        rendered = self._generator.text.chat(asked)
        if rendered[: len(self._cached)] != self._cached or len(rendered) == len(self._cached):
            # The template tells earlier turns differently now; begin again at full depth.
            self._cache.rewind()
            self._cached = []
        prompt = rendered[len(self._cached) :]
        ids: list[int] = []
        pieces = self._generator.stream(
            [prompt],
            speedup=speedup,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            cache=self._cache,
            chat=True,
        )
        answer = {"role": "assistant", "content": ""}
        for piece in pieces:
            # Kept up with every token, as the caller may stop listening. The last one has not been fed.
            self.messages = [*asked, answer]
            self._cached = rendered + ids
            answer["content"] += piece.text
            ids.append(piece.token)
            yield piece
