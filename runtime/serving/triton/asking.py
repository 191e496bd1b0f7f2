"""Turn the tensors of a request into work for a worker, and deliveries into tensors of its responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json, parse_json_object
from dynexport.runtime.generation.model import Prompt
from dynexport.runtime.serving.submit import make_work, wanted_depth
from dynexport.runtime.serving.triton.fields import INPUTS, NEW_TOKENS, OUTPUTS, PROMPTS
from dynexport.runtime.serving.triton.loading import Loaded
from dynexport.runtime.serving.work import Delivery, Work

Array = np.ndarray
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)
_SEVERAL = {tensor.name for tensor in INPUTS if tensor.several}
_TYPES = {"STRING": np.object_, "INT32": np.int32, "INT64": np.int64}


@dataclass(eq=False)
class Call:
    """A request and what it was answered so far.

    Attributes:
        work: what the worker runs.
        stream: whether each step's tokens are a response; else all of them are one.
        generated: number of tokens so far.
        done: true after the last delivery.
    """

    work: Work
    stream: bool
    generated: int = 0
    done: bool = False
    _kept: list[Delivery] = field(default_factory=list)

    def response(self, delivery: Delivery) -> dict[str, Array] | None:
        """Return the outputs to send for a delivery, by name; None if there is nothing to send yet."""
        self.generated += len(delivery.answered)
        self.done = delivery.done
        self._kept.append(delivery)
        if not self.stream and not delivery.done:
            return None
        answered = [one for each in self._kept for one in each.answered]
        self._kept.clear()
        if not answered:
            return None
        values: dict[str, Any] = {
            "text_output": ["".join(one.piece.text for one in answered).encode()],
            "output_ids": [one.piece.token for one in answered],
            "layers": [one.layers for one in answered],
            "finish_reason": [(answered[-1].piece.finish_reason or "").encode()],
            "prompt_tokens": [len(self.work.prompt)],
            "completion_tokens": [self.generated],
            "cached_tokens": [self.work.reused],
        }
        return {tensor.name: np.array(values[tensor.name], _TYPES[tensor.kind]) for tensor in OUTPUTS}


def read(loaded: Loaded, tensors: Mapping[str, Array], seconds: float | None = None) -> Call:
    """Return what a request asks for.

    Args:
        loaded: the model.
        tensors: the request's inputs by name, of ``INPUTS``' types; text as UTF-8 bytes in object arrays.
        seconds: time limit, waiting included; None for no limit.

    Raises:
        DynexportError: for inputs that contradict each other, or that the model refuses.
    """
    given = {name: _value(name, tensor) for name, tensor in tensors.items()}
    model, recommended = loaded.worker.model, loaded.recommended
    prompts = [name for name in PROMPTS if name in given]
    if len(prompts) != 1:
        raise DynexportError(f"inputs: expected one of {', '.join(PROMPTS)}, found {' and '.join(prompts) or 'none'}")
    ids = _ids(loaded, prompts[0], given[prompts[0]])
    most = max(1, min(NEW_TOKENS, loaded.worker.scheduler.tokens - len(ids)))
    own_stop = recommended.stop if model.text.has_tokenizer else ()
    work = make_work(
        model,
        ids,
        max_new_tokens=checked_count("max_tokens", given.get("max_tokens", most)),
        sampling=replace(recommended.sampling, **{name: given[name] for name in _SAMPLING if name in given}),
        depth=wanted_depth(model, given.get("depth")),
        stop=[*given.get("stop", ()), *own_stop],
        chat=prompts[0] == "messages",
        schema=parse_json_object(given["json_schema"], "json_schema") if "json_schema" in given else None,
        stop_token_ids=given.get("stop_token_ids", ()),
        seconds=seconds,
    )
    return Call(work, given.get("stream", False))


def _value(name: str, tensor: Array) -> Any:
    """Return a tensor's value, or the list of its values if it may have several."""
    values = [_plain(name, value) for value in tensor.reshape(-1)]
    if name in _SEVERAL:
        return values
    if len(values) != 1:
        raise DynexportError(f"{name}: expected one value, found {len(values)}")
    return values[0]


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DynexportError(f"{name}: expected UTF-8 text, found {error.reason} at byte {error.start}") from error
    # The shortest decimal that is this float32: 0.7, as the client wrote it, and not 0.699999988.
    return float(str(value)) if isinstance(value, np.float32) else value.item() if hasattr(value, "item") else value


def _ids(loaded: Loaded, name: str, prompt: Any) -> Prompt:
    """Return the prompt's token ids."""
    text = loaded.worker.model.text
    if name == "text_input":
        return text.encode(prompt)
    if name == "messages":
        return text.chat(_listed(prompt, name))
    ids: Prompt = prompt
    return ids


def _listed(prompt: str, name: str) -> list[Any]:
    found = parse_json(prompt, name)
    if not isinstance(found, list):
        raise DynexportError(f"{name}: expected a JSON list, found {type(found).__name__}")
    return found


__all__ = ["Call", "read"]
