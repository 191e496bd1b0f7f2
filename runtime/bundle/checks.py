"""Check the arguments of public calls; a wrong one raises a one-line DynexportError that names it."""

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
# The most characters of a value that an error shows.
_SHOWN = 80


def shown(value: object) -> str:
    """Return a short text of any value, for an error message."""
    try:
        text = repr(value)
    except Exception:  # an unknown class may raise anything from its repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.."


def is_integer(value: object) -> bool:
    """Return whether a value is an integer, Python's or numpy's, but not a bool."""
    # int first: the check against an abstract class takes a microsecond for every token.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number, Python's or numpy's, that fits float64; a bool is not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def checked_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return an argument that must be an integer from ``least`` to ``most``, as int.

    Raises:
        DynexportError: when it is not; it names the argument.
    """
    if is_integer(value) and value >= least and (most is None or value <= most):
        return int(value)
    raise DynexportError(f"{name}: expected {_range(least, most)}, found {shown(value)}")


def _range(least: int, most: int | None) -> str:
    return f"at least {least}" if most is None else f"{least}..{most}"


def checked_share(name: str, value: Any) -> float:
    """Return an argument that must be a number above 0 and at most 1. Raises DynexportError when it is not."""
    if is_number(value) and 0 < value <= 1:
        return float(value)
    raise DynexportError(f"{name}: expected 0 < {name} <= 1, found {shown(value)}")


def checked_list(name: str, values: Any, of_what: str) -> list[Any]:
    """Return the items of an iterable argument as a list.

    Raises:
        DynexportError: for text, bytes, a mapping, or a value that is not iterable; it names the argument.
    """
    if type(values) is list or type(values) is tuple:  # first, because the check against an abstract class is slower
        return list(values)
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping):
        try:
            return list(values)
        except TypeError:  # an array without dimensions
            pass
    raise DynexportError(f"{name}: expected a list of {of_what}, found {shown(values)}")


def checked_kind(name: str, value: Any, kind: type | UnionType, what: str) -> None:
    """Raise DynexportError, which names the argument, for a value of another class."""
    if not isinstance(value, kind):
        raise DynexportError(f"{name}: expected {what}, found {shown(value)}")


def checked_path(name: str, value: Any) -> Path:
    """Return a Path for an argument that is a Path or str. Raises DynexportError when it is neither."""
    if isinstance(value, str | Path):
        return Path(value)
    raise DynexportError(f"{name}: expected a path, found {shown(value)}")


def checked_ids(name: str, values: Any, vocabulary: int) -> Array:
    """Return token ids as int64 [n].

    Args:
        values: an iterable of integers, or an integer array of one dimension.

    Raises:
        DynexportError: when it is not iterable, or an item is not an id of the vocabulary; it names the argument.
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
    """Return prescribed routing decisions, bool or integers of this shape, as int64.

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
    """Return one bool for each row, as bool [rows]. Raises DynexportError for any other shape or type."""
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
