"""Checked access to the fields of a Hugging Face config; errors name the field and the value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dynexport.exporter.families.architecture import Activation
from dynexport.exporter.families.class_fields import HARMLESS
from dynexport.runtime.bundle.errors import DynexportError

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
    "relu2": "relu2",
}
_LARGEST_SIZE = (1 << 31) - 1
_MOST_LAYERS = 4096
_SMALLEST, _LARGEST = 1e-30, 1e30


class Fields:
    """The fields of one config.json, with a record of those that a family reads.

    Args:
        config: the JSON object, with the defaults of the family's class for absent fields.
        family: the model_type, for messages.

    Attributes:
        asked: field -> "read", or "only" and the value that it must have; for the table in the docs.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self._config = config
        self._prefix = ""
        self.family = family
        self.asked: dict[str, str] = {}

    def within(self, where: str, values: Mapping[str, Any]) -> Fields:
        """Return the fields of an object inside the config; errors name ``where`` before the field."""
        found = Fields(values, self.family)
        found._prefix = self._prefix + where
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """Return the unchecked value, or ``default`` if it is absent or null."""
        self.asked[name] = "read"
        value = self._config.get(name)
        return default if value is None else value

    def error(self, name: str, value: Any, expected: str) -> DynexportError:
        """Return an error that names the field, the expected and the found value."""
        return DynexportError(
            f"config.json ({self.family}): {self._prefix}{name:.80}: expected {expected}, found {value!r:.200}"
        )

    def integer(self, name: str, default: int | None = None, at_least: int = 1, at_most: int = _LARGEST_SIZE) -> int:
        """Return an integer in a range, or ``default`` if it is absent or null."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
            raise self.error(name, value, f"an integer from {at_least} to {at_most}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Return a size, or None if it is absent or null."""
        return None if self.get(name) is None else self.integer(name)

    def layers(self, name: str) -> int:
        """Return a number of layers, bounded so that a hostile config cannot ask for a huge graph."""
        return self.integer(name, at_most=_MOST_LAYERS)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number well within float32's range; ``default`` if it is absent, an error if it is null."""
        self.asked[name] = "read"
        value = self._config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
            raise self.error(name, value, f"a number from {_SMALLEST:g} to {_LARGEST:g}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Return a positive number, or None if it is absent or null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """Return a boolean; an error if it is absent or null."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def only(self, name: str, supported: Any, meaning: str = "") -> None:
        """Raise DynexportError unless a field is absent, null or has the one supported value.

        Args:
            name: the field.
            supported: its only supported value.
            meaning: where the value comes from, when it follows from another field.
        """
        self.asked[name] = f"only {meaning or json.dumps(supported)}"
        value = self._config.get(name)
        if value is not None and value != supported:
            reason = f"as {meaning}" if meaning else "the only one supported"
            raise self.error(name, value, "no value" if supported is None else f"{supported!r:.200}, {reason}")

    def activation(self, name: str) -> Activation:
        """Return the MLP's activation function."""
        value = self.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.error(name, value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def check_known(self) -> None:
        """Check that every field was read, is known to have no effect, or is off (null, false or empty).

        Raises:
            DynexportError: naming the first field that may change the computation.
        """
        for name, value in self._config.items():
            is_off = value is None or value is False or value in ([], {}, "")
            if name not in self.asked and name not in HARMLESS and not is_off:
                raise DynexportError(
                    f"config.json ({self.family}): {self._prefix}{name:.80}: expected no such field, as it may change "
                    f"what the model computes, found {value!r:.80}; if it does not, remove it from config.json"
                )
