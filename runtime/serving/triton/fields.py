"""The tensors and settings of a model in Triton, as its config.pbtxt declares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from dynexport.runtime.serving.settings import PREFIX_BYTES, Settings

Kind: TypeAlias = Literal["STRING", "BOOL", "INT32", "INT64", "FP32"]
_DEFAULTS = Settings()
NEW_TOKENS = 128


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: its name.
        kind: Triton's data type, without ``TYPE_``.
        text: what it is, for people.
        several: true for any number of values, [-1]; false for one, [1].
    """

    name: str
    kind: Kind
    text: str
    several: bool = False


@dataclass(frozen=True)
class Setting:
    """A parameter of the model.

    Attributes:
        name: its name.
        default: the value of a model whose config.pbtxt does not give it; "" if that depends on the machine or model.
        text: what it is, for people.
    """

    name: str
    default: str
    text: str


# All inputs are optional to Triton; a request gives one of PROMPTS.
PROMPTS = ("text_input", "input_ids", "messages")
INPUTS = (
    Tensor("text_input", "STRING", "The prompt, as text."),
    Tensor("input_ids", "INT64", "The prompt, as token ids, in place of text_input.", several=True),
    Tensor("messages", "STRING", "A conversation in place of text_input: JSON, a list of objects with role, content."),
    Tensor("max_tokens", "INT32", f"Most new tokens; {NEW_TOKENS}, or what fits, by default."),
    Tensor("stream", "BOOL", "True for a response per step, false (the default) for one response at the end."),
    Tensor("depth", "STRING", "The layers that run: a ratio such as 2, a kept set's name, or full."),
    Tensor("temperature", "FP32", "0 takes the most probable token; the author's value by default, or 0."),
    Tensor("top_p", "FP32", "Keep the most probable tokens with this total probability."),
    Tensor("top_k", "INT32", "Keep this many of the most probable tokens; 0 keeps all."),
    Tensor("min_p", "FP32", "Keep tokens at least this many times as probable as the most probable one."),
    Tensor("seed", "INT64", "Makes the draws repeatable."),
    Tensor("repetition_penalty", "FP32", "Above 1 makes tokens of the prompt and the answer less probable."),
    Tensor("frequency_penalty", "FP32", "Subtracted from a token's logit for each time that it was generated."),
    Tensor("presence_penalty", "FP32", "Subtracted from the logit of a token that was generated."),
    Tensor("stop", "STRING", "Strings that end the answer; they are not part of it.", several=True),
    Tensor("stop_token_ids", "INT64", "Token ids that end the answer.", several=True),
    Tensor("json_schema", "STRING", "A JSON schema that the answer fulfils; needs dynexport[structured]."),
)
OUTPUTS = (
    Tensor("text_output", "STRING", "The text since the response before; empty without a tokenizer."),
    Tensor("output_ids", "INT64", "The token ids since the response before.", several=True),
    Tensor("layers", "INT32", "For each of these tokens, how many layers ran to choose it.", several=True),
    Tensor("finish_reason", "STRING", "Empty before the last response; then stop or length."),
    Tensor("prompt_tokens", "INT32", "Number of tokens in the prompt."),
    Tensor("completion_tokens", "INT32", "Number of tokens generated up to this response."),
    Tensor("cached_tokens", "INT32", "Number of the prompt's tokens whose entries came from earlier requests."),
)
SETTINGS = (
    Setting("backend", "onnxruntime", "What runs the graphs, as dynexport serve --backend."),
    Setting("threads", "", "Threads of ONNX Runtime; all cores by default."),
    Setting("max_rows", str(_DEFAULTS.rows), "Answers that run at a time."),
    Setting("max_length", "", "Most tokens of a prompt and its answer; the model's context by default."),
    Setting("chunk", str(_DEFAULTS.chunk), "Tokens of a prompt's first chunk; later ones are smaller."),
    Setting("queue", str(_DEFAULTS.queue), "Requests that may wait; further ones are UNAVAILABLE."),
    Setting("prefix_bytes", str(PREFIX_BYTES), "Memory for known prefixes, in bytes; 0 for none."),
    Setting("drain_seconds", "20", "Seconds that running requests get to finish when it is unloaded."),
)


__all__ = ["INPUTS", "NEW_TOKENS", "OUTPUTS", "PROMPTS", "SETTINGS", "Kind", "Setting", "Tensor"]
