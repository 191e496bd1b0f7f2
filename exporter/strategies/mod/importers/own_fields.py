"""The fields that other routing code adds to config.json, checked and taken out of the config as they are read."""

from __future__ import annotations

import re
from typing import Any

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.runtime.bundle.errors import DynexportError

_LARGEST, _MOST_LAYERS = (1 << 31) - 1, 4096


class OwnFields:
    """Fields of config.json. What is taken is removed; what remains is the family's, which refuses unknown ones.

    Args:
        stored: the checkpoint.

    Attributes:
        config: the fields that have not been taken.
    """

    def __init__(self, stored: Checkpoint) -> None:
        self._stored, self.config = stored, dict(stored.config)

    def error(self, name: str, expected: str, found: Any) -> DynexportError:
        """Return an error about a field."""
        return DynexportError(f"{self._stored.source}: config.json: {name}: expected {expected}, found {found!r:.80}")

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field's unchecked value; ``default`` where it is absent or null."""
        value = self.config.pop(name, None)
        return default if value is None else value

    def drop(self, *names: str) -> None:
        """Take fields that training alone uses."""
        for name in names:
            self.config.pop(name, None)

    def one_of(self, name: str, *known: str, default: str | None = None) -> str:
        """Return a text that must be one of ``known``, or raise DynexportError."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.error(name, " or ".join(known), value)
        return value

    def integer(self, name: str, default: int | None = None, *, at_least: int = 1) -> int:
        """Return a size, or raise DynexportError."""
        return self._size(name, self.take(name, default), at_least)

    def size(self, name: str) -> int:
        """Return a size that stays in the config, or raise DynexportError."""
        return self._size(name, self.config.get(name), 1)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number, or raise DynexportError."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise self.error(name, "a number", value)
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a switch, or raise DynexportError."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value

    @property
    def layers(self) -> int:
        """The number of layers, which stays in the config."""
        value = self.config.get("num_hidden_layers")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_LAYERS:
            raise self.error("num_hidden_layers", f"an integer from 1 to {_MOST_LAYERS}", value)
        return value

    def switched_layers(self, name: str) -> list[int]:
        """Return the layers that a list of one switch a layer turns on; raise DynexportError if there are none."""
        value = self.take(name)
        if not isinstance(value, list) or len(value) != self.layers or not all(isinstance(on, bool) for on in value):
            raise self.error(name, f"a list of {self.layers} times true or false, one a layer", value)
        if not any(value):
            raise self.error(name, "true for a layer at least, as a model without routers needs no import", value)
        return [layer for layer, on in enumerate(value) if on]

    def listed_layers(self, name: str, router: str) -> list[int]:
        """Return the layers of a list, which must be those that have a router.

        Args:
            name: the field; where it is absent, the routers tell the layers.
            router: a regular expression for the names of routers, whose first group is the layer.

        Raises:
            DynexportError: when list and routers differ, or there are no routers.
        """
        found = sorted({int(match[1]) for tensor in self._stored.names if (match := re.fullmatch(router, tensor))})
        if not found:
            raise DynexportError(
                f"{self._stored.source}: expected routers named {router.replace(chr(92), '')}, found none among "
                f"{len(self._stored.names)} tensors; config.json describes another model"
            )
        listed = self.take(name, found)
        valid = isinstance(listed, list) and all(isinstance(layer, int) for layer in listed)
        if not valid or sorted(listed) != found or found[-1] >= self.layers:
            raise self.error(name, f"layers below {self.layers} that have a router, {found}", listed)
        return found

    def _size(self, name: str, value: Any, at_least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= _LARGEST:
            raise self.error(name, f"an integer from {at_least} to {_LARGEST}", value)
        return value


__all__ = ["OwnFields"]
