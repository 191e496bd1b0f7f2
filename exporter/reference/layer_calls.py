"""The arguments of one call of a decoder layer, whatever their names and nesting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Position of a value in a call: number or name of the argument, then indices into nested tuples.
Place = tuple[int | str, ...]


@dataclass(frozen=True)
class Call:
    """The arguments that a model passes to a decoder layer, by position and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> dict[Place, Any]:
        """Return all values that are not tuples, by place."""
        found: dict[Place, Any] = {}
        self.changed(lambda place, value: found.setdefault(place, value))
        return found

    def changed(self, change: Callable[[Place, Any], Any]) -> Call:
        """Return the call with every value replaced by ``change(place, value)``."""
        return Call(
            tuple(_changed((number,), value, change) for number, value in enumerate(self.args)),
            {name: _changed((name,), value, change) for name, value in self.kwargs.items()},
        )

    def with_values(self, values: dict[Place, Any]) -> Call:
        """Return the call with other values in some places."""
        return self.changed(lambda place, value: values.get(place, value))


def _changed(place: Place, value: Any, change: Callable[[Place, Any], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_changed((*place, number), part, change) for number, part in enumerate(value))
    return change(place, value)


__all__ = ["Call", "Place"]
