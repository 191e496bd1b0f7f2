"""Turn the body of a request into work for a model's worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.http.errors import ApiError
from dynexport.runtime.serving.http.protocol import ChatBody, CompletionBody, Generation, ResponseFormat
from dynexport.runtime.serving.http.served import Directory, Served
from dynexport.runtime.serving.submit import make_work
from dynexport.runtime.serving.work import Work

# OpenAI's default for text completions; a chat's answer may take all of the context.
_COMPLETION_TOKENS = 16
_TAKEN = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Asked:
    """A request for completions, ready to be submitted.

    Attributes:
        served: the model.
        name: the model's name as the request gives it, for the answer.
        works: one per prompt.
        n: number of answers to each prompt.
        stream: whether the answer is a stream of events.
        usage: whether the stream ends with the usage.
    """

    served: Served
    name: str
    works: list[Work]
    n: int
    stream: bool
    usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts."""
        return sum(len(work.prompt) for work in self.works)


def completion(directory: Directory, body: CompletionBody, seconds: float | None) -> Asked:
    """Return what a text completion asks for.

    Args:
        directory: the served models.
        body: the request's body.
        seconds: time limit of the request.

    Raises:
        ApiError: for a model or depth that does not exist, or fields that contradict each other.
        DynexportError: for a prompt or an option that the model refuses.
    """
    served, depth = directory.find(body.model, body.depth)
    n = body.n or 1
    if body.best_of not in (None, n):
        raise ApiError(400, f"best_of: expected {n}, as n, found {body.best_of}", param="best_of")
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    prompts: Sequence[Any] = body.prompt if several else [body.prompt]
    tokens = [served.model.text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    most = body.max_tokens or _COMPLETION_TOKENS
    works = [_work(served, depth, ids, body, most, seconds, logprobs=body.logprobs) for ids in tokens]
    return _asked(served, body, works, n)


def chat(directory: Directory, body: ChatBody, seconds: float | None) -> Asked:
    """Return what a chat completion asks for; arguments and errors as for ``completion``."""
    served, depth = directory.find(body.model, body.depth)
    ids = chat_tokens(served, body.messages, body.tools if body.tool_choice != "none" else None, body)
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        message = (
            f"max_tokens: expected {body.max_completion_tokens}, as max_completion_tokens, found {body.max_tokens}"
        )
        raise ApiError(400, message, param="max_tokens")
    most = body.max_completion_tokens or body.max_tokens or max(1, served.worker.scheduler.tokens - len(ids))
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs beside it, found none", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    work = _work(served, depth, ids, body, most, seconds, logprobs=logprobs, in_chat=True)
    return _asked(served, body, [work], body.n or 1)


def chat_tokens(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    body: ChatBody | None = None,
) -> list[int]:
    """Return the token ids of a conversation that ends with the opening of the assistant's turn."""
    variables = dict((body and body.chat_template_kwargs) or {})
    if tools:
        variables["tools"] = list(tools)
    return served.model.text.chat([_with_text(index, one) for index, one in enumerate(messages)], variables=variables)


def _with_text(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose text parts are one text, as most templates expect; other parts are refused."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            where = f"messages[{index}].content"
            raise ApiError(400, f"{where}: expected parts of type text, found {kind}", param=where)
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _asked(served: Served, body: Generation, works: list[Work], n: int) -> Asked:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: expected stream beside it, found none", param="stream_options")
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Asked(served, body.model, works, n, bool(body.stream), usage)


def _work(
    served: Served,
    depth: Depth,
    ids: Sequence[int],
    body: Generation,
    new_tokens: int,
    seconds: float | None,
    *,
    logprobs: int | None,
    in_chat: bool = False,
) -> Work:
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    work = make_work(
        served.model,
        ids,
        max_new_tokens=new_tokens,
        n=body.n or 1,
        sampling=_sampling(served.recommended.sampling, body, logprobs),
        depth=depth,
        stop=[*stop, *(served.recommended.stop if served.model.text.has_tokenizer else ())],
        chat=in_chat,
        schema=_schema(body.response_format),
        stop_token_ids=body.stop_token_ids or (),
        seconds=seconds,
    )
    served.worker.scheduler.check(work)
    return work


def _sampling(recommended: Sampling, body: Generation, logprobs: int | None) -> Sampling:
    """Return the author's options with those that the request gives in their place."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _TAKEN if getattr(body, name) is not None}
    if body.top_k is not None:
        given["top_k"] = max(0, body.top_k)  # -1 is vLLM's way to say all
    if body.min_tokens is not None:
        given["min_new_tokens"] = body.min_tokens
    if body.logit_bias:
        given["logit_bias"] = {_token_id(token): bias for token, bias in body.logit_bias.items()}
    return replace(recommended, **given, logprobs=logprobs)


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 10:
        raise DynexportError(f"logit_bias: expected token ids, found {text!r:.40}")
    return int(text)


def _schema(form: ResponseFormat | None) -> Mapping[str, Any] | None:
    """Return the JSON schema that a response format asks for; None for text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return _ANY_OBJECT
    schema = (form.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        where = "response_format.json_schema.schema"
        raise ApiError(400, f"{where}: expected a JSON schema, found {type(schema).__name__}", param=where)
    return schema


__all__ = ["Asked", "chat", "chat_tokens", "completion"]
