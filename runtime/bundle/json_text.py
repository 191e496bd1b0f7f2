"""Parse untrusted JSON: strictly, with bounded depth and bounded numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError

# Deeper nesting could raise RecursionError in code that walks through the value.
_DEEPEST = 64
# 10 ** 30 is a common model_max_length; 10 ** 400 does not fit a float.
_MOST_DIGITS = 40


def parse_json(content: bytes | str, where: object, advice: str = "") -> Any:
    """Return the value of a JSON text (RFC 8259); repeated keys, NaN and lone surrogates are errors.

    Args:
        content: the text; bytes are UTF-8.
        where: the source to name in an error, such as the path.
        advice: the advice at the end of an error.

    Raises:
        DynexportError: when it is not JSON, or nested more than 64 levels deep.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite
        )
        _check_levels(value)
    except RecursionError as error:
        raise _refusal(where, _too_deep(), advice) from error
    except ValueError as error:
        raise _refusal(where, error, advice) from error
    return value


def parse_json_object(content: bytes | str, where: object, advice: str = "") -> dict[str, Any]:
    """Return the JSON object of a text; arguments and errors as for ``parse_json``."""
    value = parse_json(content, where, advice)
    if not isinstance(value, dict):
        more = f"; {advice}" if advice else ""
        raise DynexportError(f"{where}: expected a JSON object, found {type(value).__name__}{more}")
    return value


def _refusal(where: object, problem: object, advice: str) -> DynexportError:
    return DynexportError(f"{where}: expected JSON, found something else ({problem}){'; ' if advice else ''}{advice}")


def _check_levels(value: Any) -> None:
    """Raise ValueError for a value that is nested too deep; iterates by level, so it needs no recursion."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(_too_deep())
        level, depth = [item for parent in level for item in _items(parent)], depth + 1


def _items(value: Any) -> Iterable[Any]:
    """Return the items of an object or list; check the characters of a string."""
    if isinstance(value, str):
        _check_characters(value)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object as dict. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{repeated!r:.80} is there twice")
    for name in found:
        _check_characters(name)
    return found


def _check_characters(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character in {text!r:.80}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def with_nulls(value: Any) -> Any:
    """Return a value for JSON, with NaN and infinity, which JSON lacks, replaced by None; tuples become lists."""
    if isinstance(value, dict):
        return {key: with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is too large a number")
    return value


def _too_deep() -> str:
    return f"more than {_DEEPEST} levels of objects or lists"
