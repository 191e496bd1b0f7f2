"""Checks of what callers pass, told in one line: numbers of a kind, and arrays as the decoders take them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError

Array = np.ndarray
# A value that is shown in an error takes so many characters at most.
_SHOWN = 80


def shown(value: object) -> str:
    """A value as an error names it: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # of a class that we know nothing of
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.."


def is_integer(value: object) -> bool:
    """Whether it is a whole number, numpy's among them; true and false are none."""
    # Plain ones first: asking for an abstract class takes a microsecond, of every token.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
    """Whether it is a finite number, numpy's among them, that float64 can hold; true and false are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def checked_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``.

    Raises:
        DynexportError: when it is none; it names the argument.
    """
    if is_integer(value) and value >= least and (most is None or value <= most):
        return int(value)
    raise DynexportError(f"{name}: expected {_range(least, most)}, found {shown(value)}")


def _range(least: int, most: int | None) -> str:
    return f"at least {least}" if most is None else f"{least}..{most}"


def checked_share(name: str, value: Any) -> float:
    """A number above 0, at most 1. Raises DynexportError when it is none; it names the argument."""
    if is_number(value) and 0 < value <= 1:
        return float(value)
    raise DynexportError(f"{name}: expected 0 < {name} <= 1, found {shown(value)}")


def checked_list(name: str, values: Any, of_what: str) -> list[Any]:
    """The items of a list, a tuple, an array or whatever else gives items one by one.

    Raises:
        DynexportError: for text, bytes, a mapping, or what has no items; it names the argument.
    """
    if type(values) is list or type(values) is tuple:  # first, as below: asking for an abstract class takes longer
        return list(values)
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping):
        try:
            return list(values)
        except TypeError:  # an array without dimensions
            pass
    raise DynexportError(f"{name}: expected a list of {of_what}, found {shown(values)}")


def checked_kind(name: str, value: Any, kind: type | UnionType, what: str) -> None:
    """Raise DynexportError for a value of another class; it names the argument."""
    if not isinstance(value, kind):
        raise DynexportError(f"{name}: expected {what}, found {shown(value)}")


def checked_path(name: str, value: Any) -> Path:
    """A path, given as one or as text. Raises DynexportError when it is neither; it names the argument."""
    if isinstance(value, str | Path):
        return Path(value)
    raise DynexportError(f"{name}: expected a path, found {shown(value)}")


def checked_ids(name: str, values: Any, vocabulary: int) -> Array:
    """Token ids as int64 [n].

    Args:
        values: whole numbers in a list, an array of one dimension, or whatever else gives them one by one.

    Raises:
        DynexportError: for what is no list, or has no token id of the vocabulary in it; it names the argument.
    """
    expected = f"token ids 0..{vocabulary - 1}"
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1:
        wrong = values[(values < 0) | (values >= vocabulary)]
        if len(wrong):
            raise DynexportError(f"{name}: expected {expected}, found {wrong[0]}")
        return values.astype(np.int64)
    ids = checked_list(name, values, "token ids")
    for value in ids:
        if not is_integer(value) or not 0 <= value < vocabulary:
            raise DynexportError(f"{name}: expected {expected}, found {shown(value)}")
    return np.array(ids, np.int64)


def checked_decisions(name: str, values: Any, shape: tuple[int, ...]) -> Array:
    """Decisions that a caller prescribes, bool or whole numbers of this shape, as int64.

    Raises:
        DynexportError: for another shape or type; it names the argument.
    """
    try:
        found = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise DynexportError(f"{name}: expected an array of shape {list(shape)}, found {shown(values)}") from error
    if found.shape != shape or found.dtype.kind not in "biu":
        raise DynexportError(
            f"{name}: expected bool or whole numbers of shape {list(shape)}, found {found.dtype} {list(found.shape)}"
        )
    return found.astype(np.int64)


def checked_rows(name: str, values: Any, rows: int) -> Array:
    """One bool for each row, bool [rows]. Raises DynexportError when it is anything else; it names the argument."""
    found = np.asarray(checked_list(name, values, f"{rows} bools"))
    if found.shape != (rows,) or found.dtype != np.bool_:
        raise DynexportError(
            f"{name}: expected bool of shape [{rows}], one a row, found {found.dtype} {list(found.shape)}"
        )
    return found


__all__ = [
    "checked_count",
    "checked_decisions",
    "checked_ids",
    "checked_kind",
    "checked_list",
    "checked_path",
    "checked_rows",
    "checked_share",
    "is_integer",
    "is_number",
    "shown",
]
