"""A chat over several turns on one KV cache: each turn runs only its new tokens."""

from __future__ import annotations

from collections.abc import Generator as Steps
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from dynexport.runtime.bundle.checks import checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.claim import Claim
from dynexport.runtime.execution.kv_cache import STEP
from dynexport.runtime.generation.model import Model, Options, WantedDepth
from dynexport.runtime.generation.request import Piece
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.generation.speculation import Speculation
from dynexport.runtime.generation.stream import Stream
from dynexport.runtime.text.text import NO_VARIABLES


class Conversation:
    """The messages of a chat and the KV cache of their tokens.

    A turn's prompt runs in all layers, while earlier generated tokens have entries in the kept layers only
    (docs/routing-contract.md, unified-skip). Turns run one at a time: a turn is refused while another answer, of any
    thread, has not ended.

    Attributes:
        context: capacity in tokens.
        messages: the messages so far; the text up to the interruption for an answer that did not end.

    Args:
        model: the model of a bundle with a tokenizer and a chat template.
        system: the system message, or None.
        variables: more variables of the chat template, as for ``Text.chat``.

    Raises:
        DynexportError: for an argument of another type.
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
        """True when the context has no room for another token."""
        return int(self._cache.positions[0]) >= self.context

    def say(
        self,
        content: str,
        *,
        depth: WantedDepth,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        speculation: Speculation | None = None,
    ) -> Stream:
        """Stream the answer to a user's message.

        After an answer that is closed early or interrupted, the conversation continues from the tokens so far.

        Args:
            content: the user's message.
            depth: as for ``Model.stream``, like the arguments below.
            max_new_tokens: the largest number of tokens in the answer.
            sampling: how tokens are chosen.
            stop: strings that end the answer.
            speculation: how next tokens are drafted.

        Raises:
            DynexportError: as for ``Model.stream``, and while another turn's answer has not ended.
        """
        options = Options(
            depth=depth, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, speculation=speculation, chat=True
        )
        return Stream(self._turn(content, options))

    def _turn(self, content: str, options: Options) -> Steps[Piece, None, None]:
        with self._claim:
            yield from self._answer(content, options)

    def _answer(self, content: str, options: Options) -> Steps[Piece, None, None]:
        asked = [*self.messages, {"role": "user", "content": content}]
        rendered = self._model.text.chat(asked, variables=self._variables)
        if rendered[: len(self._cached)] != self._cached or len(rendered) == len(self._cached):
            # The template renders earlier turns differently now, so all of them run again at full depth.
            self._cache.rewind(0)
            self._cached = []
        prompt = rendered[len(self._cached) :]
        room = self.context - len(self._cached)
        if len(prompt) > room:
            raise DynexportError(
                f"prompt: expected at most {room} tokens, the room left in the context of {self.context}, found "
                f"{len(prompt)}; shorten the message or start another conversation"
            )
        ids: list[int] = []
        answer = {"role": "assistant", "content": ""}
        stream = self._model.stream([prompt], cache=self._cache, held=[self._cached], **options)
        state = self._cache.mark(0), self._cached
        try:
            with closing(stream) as pieces:
                for piece in pieces:
                    # Updated per token, as the caller may close the stream. The last token is not in the cache yet.
                    # A step with drafts has run all of its tokens before the first of them comes.
                    if self._cache.positions[0] == len(rendered) + len(ids):
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
