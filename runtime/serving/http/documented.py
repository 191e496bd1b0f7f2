"""The bodies of answers as the OpenAPI document has them."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Answer):
    """The error of a request, in OpenAI's form.

    Attributes:
        message: one line: which field, what was expected and what was found.
        type: the kind of error, such as "invalid_request_error".
        param: the field.
        code: a constant for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """The body of an answer to a request that failed."""

    error: Problem


class CachedTokens(_Answer):
    """The part of a prompt that was known.

    Attributes:
        cached_tokens: number of tokens whose KV cache entries were copied.
    """

    cached_tokens: int


class Usage(_Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class _Choice(_Answer):
    index: int
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    layers: list[int]


class CompletionLogprobs(_Answer):
    """Log probabilities of a text completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Choice):
    """One answer of a text completion.

    Attributes:
        text: the answer.
        layers: number of layers that each of its tokens ran in.
    """

    text: str
    logprobs: CompletionLogprobs | None


class _Whole(_Answer):
    id: str
    created: int
    model: str
    usage: Usage


class Completion(_Whole):
    """A text completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Message(_Answer):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatToken(_Answer):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatToken):
    """A token of the answer, with the most probable ones in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(_Answer):
    """Log probabilities of a chat completion's tokens."""

    content: list[ChatLogprob]
    refusal: None


class ChatChoice(_Choice):
    """One answer of a chat completion.

    Attributes:
        message: the answer.
        layers: number of layers that each of its tokens ran in.
    """

    message: Message
    logprobs: ChatLogprobs | None


class Chat(_Whole):
    """A chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelDepth(_Answer):
    """A depth that requests may ask for.

    Attributes:
        name: its name.
        ratio: layers of the model per layer that runs.
        layers: number of layers that run.
        trained: whether the model was trained with it.
    """

    name: str
    ratio: float
    layers: int
    trained: bool


class ServedModel(_Answer):
    """A served model.

    Attributes:
        id: its name, or its name with a depth.
        max_model_len: most tokens of a prompt and its answer.
        layers: number of layers.
        depths: the depths that it can run at.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    layers: int
    depths: list[ModelDepth]


class Models(_Answer):
    """All served models."""

    object: Literal["list"]
    data: list[ServedModel]


class Tokens(_Answer):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(_Answer):
    """The text of tokens."""

    prompt: str


class Health(_Answer):
    """The state of the process, as /health reports it.

    Attributes:
        status: "ok", or "not ready" when a model's worker has ended by an error.
        problems: one line per model whose worker has ended.
    """

    status: Literal["ok", "not ready"]
    problems: dict[str, str] = {}


class Ready(_Answer):
    """The state of the models, as /ready reports it.

    Attributes:
        status: "ready" or "not ready".
        problems: one line per model that is not ready.
    """

    status: Literal["ready", "not ready"]
    problems: dict[str, str] = {}


ERRORS: Final[dict[int | str, dict[str, Any]]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}


def streaming(answer: type[BaseModel]) -> dict[str, Any]:
    """Return the options of a route whose answer is whole or a stream of events.

    Args:
        answer: the whole answer.
    """
    described = "The whole answer, or with `stream` server-sent events, the last of which is `[DONE]`."
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "response_model": answer,
        "responses": {**ERRORS, 200: {"description": described, "content": events}},
    }


__all__ = [
    "ERRORS",
    "Chat",
    "Completion",
    "Detokenized",
    "Error",
    "Health",
    "Models",
    "Ready",
    "ServedModel",
    "Tokens",
    "streaming",
]
