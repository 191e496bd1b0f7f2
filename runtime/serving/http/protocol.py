"""The bodies of requests, field by field as OpenAI's API has them, with the fields that vLLM and dynexport add."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynexport.runtime.serving.submit import MOST_CHOICES

Ids = list[Annotated[int, Field(ge=0)]]
# Most prompts of a body.
MOST_PROMPTS = 128
_MOST_STOPS = 16
# Fields of OpenAI's API that are refused by name, as the answer would not be what they ask for.
UNSUPPORTED: Final = frozenset(
    (
        "audio",
        "function_call",
        "functions",
        "modalities",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    )
)


class Body(BaseModel):
    """A request's body: unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_characters(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("text of whole characters, found half of a surrogate pair") from error
        return values


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: true sends the usage as the last event.
    """

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Body):
    """The form of the answer.

    Attributes:
        type: "text", "json_object" for any JSON object, or "json_schema".
        json_schema: with "json_schema": the schema under "schema", and a name.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Generation(Body):
    """The fields that both kinds of completions have.

    Attributes:
        model: a served model's name, or name@depth.
        depth: a ratio, a name that the bundle declares, or "full"; None as the model was trained.
        n: number of answers.
        stream: true sends events while the answer is generated.
        stop: strings that end the answer; they are not part of it.
        temperature: 0 is greedy; fields that are not given are the model's generation_config.json's.
        min_tokens: number of tokens before an end token is allowed.
        stop_token_ids: ids that end the answer.
    """

    model: str
    depth: str | float | None = None
    n: int | None = Field(default=1, ge=1, le=MOST_CHOICES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS)] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1e-6, le=1e6)
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: Ids | None = None
    # Without effect on the answer here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Generation):
    """The body of a text completion.

    Attributes:
        prompt: text or token ids, or several of either.
        logprobs: number of most probable tokens to report for each token, 0 to 20.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[list[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: None = None


class ChatBody(Generation):
    """The body of a chat completion.

    Attributes:
        messages: the conversation; each has a role, and text or text parts as content.
        max_completion_tokens: the newer name of max_tokens.
        logprobs: true reports the log probability of each token.
        top_logprobs: number of most probable tokens to report for each token.
        tools: passed to the chat template; answers are text.
        chat_template_kwargs: further variables of the chat template.
    """

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(Body):
    """The body of a tokenization: a prompt or messages."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """The body of a detokenization."""

    model: str
    tokens: Ids


__all__ = [
    "MOST_PROMPTS",
    "UNSUPPORTED",
    "Body",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "Generation",
    "ResponseFormat",
    "StreamOptions",
    "TokenizeBody",
]
