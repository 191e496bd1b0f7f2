"""Turn deliveries into the bodies of answers and the events of streams, as OpenAI's API has them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dynexport.runtime.generation.request import TokenLogprobs
from dynexport.runtime.serving.http.asking import Asked
from dynexport.runtime.serving.work import Answered, Delivery
from dynexport.runtime.text.text import Text

Kind = Literal["completion", "chat"]
_OBJECTS = {
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
}
_IDS = {"completion": "cmpl-", "chat": "chatcmpl-"}
DONE = b"data: [DONE]\n\n"


@dataclass
class _Choice:
    """One answer so far."""

    text: str = ""
    layers: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Answer:
    """The answer to a request, made from what its worker delivers.

    Args:
        kind: which kind of completion it is.
        asked: the request.
    """

    def __init__(self, kind: Kind, asked: Asked) -> None:
        self._kind, self._asked = kind, asked
        self._text = asked.served.model.text
        self._first = {work: index * asked.n for index, work in enumerate(asked.works)}
        self._head = {
            "id": _IDS[kind] + uuid.uuid4().hex,
            "object": _OBJECTS[kind, asked.stream],
            "created": int(time.time()),
            "model": asked.name,
        }
        self._choices = [_Choice() for _ in range(asked.n * len(asked.works))]
        self._generated = 0

    def add(self, delivery: Delivery) -> None:
        """Add what was delivered."""
        for index, answered in self._by_choice(delivery):
            choice = self._choices[index]
            for one in answered:
                choice.text += one.piece.text
                choice.layers.append(one.layers)
                if one.piece.logprobs is not None:
                    choice.logprobs += self._logprobs(one)
            last = answered[-1].piece
            choice.finish_reason, choice.stop_reason = last.finish_reason, last.stop_reason

    def body(self) -> dict[str, Any]:
        """Return the body of the whole answer."""
        choices = []
        for index, choice in enumerate(self._choices):
            entry = self._entry(index, choice.finish_reason, choice.stop_reason, choice.layers)
            if self._kind == "chat":
                entry["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                entry["text"] = choice.text
            entry["logprobs"] = self._written(choice.logprobs)
            choices.append(entry)
        return {**self._head, "choices": choices, "usage": self._usage()}

    def opening(self) -> Iterator[bytes]:
        """Yield the events before the first token."""
        if self._kind == "chat":
            for index in range(len(self._choices)):
                delta = {"role": "assistant", "content": "", "refusal": None}
                yield self._event([{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}])

    def events(self, delivery: Delivery) -> Iterator[bytes]:
        """Yield the events of what was delivered, one per answer that has new tokens."""
        for index, answered in self._by_choice(delivery):
            text = "".join(one.piece.text for one in answered)
            last = answered[-1].piece
            entry = self._entry(index, last.finish_reason, last.stop_reason, [one.layers for one in answered])
            entry |= {"delta": {"content": text}} if self._kind == "chat" else {"text": text}
            found = [part for one in answered if one.piece.logprobs is not None for part in self._logprobs(one)]
            entry["logprobs"] = self._written(found)
            yield self._event([entry])

    def closing(self) -> Iterator[bytes]:
        """Yield the events after the last token."""
        if self._asked.usage:
            yield self._event([], usage=self._usage())
        yield DONE

    def _by_choice(self, delivery: Delivery) -> Iterator[tuple[int, list[Answered]]]:
        self._generated += len(delivery.answered)
        groups: dict[int, list[Answered]] = {}
        for one in delivery.answered:
            groups.setdefault(self._first[delivery.work] + one.piece.row, []).append(one)
        yield from groups.items()

    @staticmethod
    def _entry(index: int, reason: str | None, stop: int | str | None, layers: Sequence[int]) -> dict[str, Any]:
        return {"index": index, "finish_reason": reason, "stop_reason": stop, "layers": layers}

    def _usage(self) -> dict[str, Any]:
        prompt, works = self._asked.prompt_tokens, self._asked.works
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(work.reused for work in works)},
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "choices": choices, **more})

    def _logprobs(self, one: Answered) -> list[dict[str, Any]]:
        found = one.piece.logprobs
        assert isinstance(found, TokenLogprobs)
        top = [_token(self._text, token, logprob) for token, logprob in found.top]
        return [{**_token(self._text, one.piece.token, found.logprob), "top_logprobs": top}]

    def _written(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return log probabilities in the form of this kind of completion; None if there are none."""
        if not found:
            return None
        if self._kind == "chat":
            return {"content": found, "refusal": None}
        tokens, offsets, length = [one["token"] for one in found], [], 0
        for token in tokens:
            offsets.append(length)
            length += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one["logprob"] for one in found],
            "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in found],
            "text_offset": offsets,
        }


def event(content: Any) -> bytes:
    """Return a server-sent event with a JSON text."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _token(text: Text, token: int, logprob: float) -> dict[str, Any]:
    shown = text.decode([token], skip_special_tokens=False) if text.has_tokenizer else str(token)
    return {"token": shown, "logprob": max(logprob, -9999.0), "bytes": list(shown.encode())}


__all__ = ["DONE", "Answer", "Kind", "event"]
