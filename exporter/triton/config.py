"""Write the config.pbtxt of a model: its tensors and settings, each with a comment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dynexport.runtime.serving.triton.fields import INPUTS, OUTPUTS, SETTINGS, Tensor

# The first line, by which a later export knows what it may replace.
MARK = "# Written by dynexport export-triton."


def config_text(name: str, settings: Mapping[str, str]) -> str:
    """Return the text of a config.pbtxt.

    Args:
        name: the model's name.
        settings: values of settings of ``runtime.serving.triton.fields``, as text; others have their defaults.
    """
    lines = [
        MARK,
        f"name: {_quoted(name)}",
        'backend: "python"',
        "# Requests are batched by the model itself, at every step: Triton hands them over one by one.",
        "max_batch_size: 0",
        "# A request has any number of responses.",
        "model_transaction_policy { decoupled: true }",
        "# One instance runs all requests; a second one would load the weights again.",
        "instance_group [ { count: 1, kind: KIND_CPU } ]",
        "",
        *_tensors("input", INPUTS, "optional: true"),
        *_tensors("output", OUTPUTS),
        *_settings(settings),
    ]
    return "\n".join(lines) + "\n"


def _tensors(word: str, tensors: Sequence[Tensor], *more: str) -> Iterator[str]:
    for tensor in tensors:
        fields = [f"name: {_quoted(tensor.name)}", f"data_type: TYPE_{tensor.kind}"]
        fields += [f"dims: [ {-1 if tensor.several else 1} ]", *more]
        yield f"# {tensor.text}"
        yield f"{word} [ {{ {', '.join(fields)} }} ]"
    yield ""


def _settings(settings: Mapping[str, str]) -> Iterator[str]:
    """Yield all settings; those without a value as comments, for people to fill in."""
    for setting in SETTINGS:
        value = settings.get(setting.name, setting.default)
        line = f"parameters {{ key: {_quoted(setting.name)}, value: {{ string_value: {_quoted(value)} }} }}"
        yield f"# {setting.text}"
        yield line if value else f"# {line}"


def _quoted(text: str) -> str:
    """Return a string of protobuf's text format; names and settings have no other characters than printable ASCII."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


__all__ = ["MARK", "config_text"]
