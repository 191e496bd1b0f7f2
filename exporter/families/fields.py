"""Reading a Hugging Face config: every value is checked, and an error names the field and the value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dynexport.exporter.architecture import Activation, Rotary
from dynexport.exporter.families.class_fields import HARMLESS
from dynexport.runtime.errors import DynexportError

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_FIELDS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_LARGEST_SIZE = (1 << 31) - 1
_MOST_LAYERS = 4096
_SMALLEST, _LARGEST = 1e-30, 1e30


class Fields:
    """The fields of one config.json, with a record of those that a family reads.

    Args:
        config: the JSON object, completed with the defaults of the family's class.
        family: its model_type, for messages.

    Attributes:
        asked: field -> "read", or the values that are insisted on, in words; for the table in the docs.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self._config = config
        self.family = family
        self.asked: dict[str, str] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or ``default`` where it is absent or null."""
        self.asked[name] = "read"
        value = self._config.get(name)
        return default if value is None else value

    def error(self, name: str, value: Any, expected: str) -> DynexportError:
        """An error that names the field, what was expected and what was found."""
        return DynexportError(f"config.json ({self.family}): {name}: expected {expected}, found {value!r:.200}")

    def integer(self, name: str, default: int | None = None, at_least: int = 1, at_most: int = _LARGEST_SIZE) -> int:
        """A size; where it is null, ``default``."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
            raise self.error(name, value, f"an integer from {at_least} to {at_most}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A size; null where the model does without."""
        return None if self.get(name) is None else self.integer(name)

    def layers(self, name: str) -> int:
        """How many layers; a hostile config cannot ask for a graph without end."""
        return self.integer(name, at_most=_MOST_LAYERS)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, far enough from what float32 cannot hold; null is an error."""
        self.asked[name] = "read"
        value = self._config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
            raise self.error(name, value, f"a number from {_SMALLEST:g} to {_LARGEST:g}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A positive number; null where the model does without."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def only(self, name: str, supported: Any, meaning: str = "") -> None:
        """Insist on the one value of a field that this project supports; absent or null is taken to be it.

        Args:
            meaning: where the value follows from other fields, from which.
        """
        self.asked[name] = f"only {meaning or json.dumps(supported)}"
        value = self._config.get(name)
        if value is not None and value != supported:
            reason = f"as {meaning}" if meaning else "the only one supported"
            raise self.error(name, value, "no value" if supported is None else f"{supported!r:.200}, {reason}")

    def activation(self, name: str) -> Activation:
        """The MLP's activation function."""
        value = self.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.error(name, value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def check_known(self) -> None:
        """Insist that every field was read, is known to be without effect, or is null.

        Raises:
            DynexportError: naming the first that may change the computation.
        """
        for name, value in self._config.items():
            if name not in self.asked and name not in HARMLESS and value is not None:
                raise DynexportError(
                    f"config.json ({self.family}): {name:.80}: expected no such field, as it may change what the model "
                    f"computes, found {value!r:.80}; if it does not, take it out of config.json"
                )

    def rotary(
        self, head_dim: int, *, theta: float = 10000.0, theta_name: str = "rope_theta", share: float | None = None
    ) -> Rotary:
        """Rotary frequencies: transformers 5's ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``.

        Args:
            head_dim: channels of a head.
            theta: the family's default base.
            theta_name: where older configs keep the base.
            share: default of ``partial_rotary_factor``, the share of a head's channels that is rotated; None in a
                family that always rotates all of them.
        """
        name = "rope_parameters" if self.get("rope_scaling", {}) == {} else "rope_scaling"
        rope = self.get(name, {})
        if not isinstance(rope, dict):
            raise self.error(name, rope, "an object")
        fields = Fields({**self._config, theta_name: self.get(theta_name, theta), **rope}, self.family)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise self.error("rope_type", kind, "default, linear or llama3")
        for key, value in rope.items():
            if key not in _ROPE_FIELDS:
                raise self.error(f"{name}.{key}", value, f"one of the fields {', '.join(_ROPE_FIELDS)}")
        if share is None:
            fields.only("partial_rotary_factor", 1.0)
        factor = 1.0 if share is None else fields.number("partial_rotary_factor", share)
        dim = int(head_dim * factor)
        if dim < 2 or dim % 2 or dim > head_dim:
            raise self.error("partial_rotary_factor", factor, f"an even number of the {head_dim} channels of a head")
        base = fields.number("rope_theta" if "rope_theta" in rope else theta_name)
        plain = [base ** (-i / dim) for i in range(0, dim, 2)]
        return Rotary(dim, tuple(_scaled(plain, kind, fields)))


def _scaled(frequencies: list[float], kind: str, fields: Fields) -> list[float]:
    """Frequencies of ``rope_type`` default, linear, or llama3 (transformers' ``_compute_llama3_parameters``)."""
    if kind == "default":
        return frequencies
    factor = fields.number("factor")
    if kind == "linear":
        return [frequency / factor for frequency in frequencies]
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.error("high_freq_factor", high, f"more than low_freq_factor, which is {low:g}")
    context = fields.number("original_max_position_embeddings")
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled
