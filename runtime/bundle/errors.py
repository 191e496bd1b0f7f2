"""The one exception that users see, and its exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_GOOD = 0
EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2
# Characters of an error. A longer one loses its middle: the place stands at its start, what to do at its end.
_LONGEST, _END = 900, 300
# Of which a library's own message may take so many.
_REASON = 300


class DynexportError(Exception):
    """Bad usage or input, told in one line: what, where, expected and found, what to do.

    Names and values of a hostile input may stand in it: what would break the line is escaped, and it has an end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Escape what would break a line or control a terminal, and cut the middle out of a text of endless length."""
    return _shortened(printable(_shortened(text)))


def printable(text: str) -> str:
    """Escape what would break a line or control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _END - 4]} .. {text[-_END:]}"


def require_module(name: str, extra: str, purpose: str) -> object:
    """Import an optional module, or say in one line how to install it.

    Args:
        name: the module to import, such as ``"torch"``.
        extra: the extra of this distribution that brings it.
        purpose: what it is needed for, as the end of "is needed to ...".

    Raises:
        DynexportError: when the module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DynexportError(
            f"{name} is needed to {purpose} and is not installed: pip install 'dynexport[{extra}]'"
        ) from error


@contextmanager
def told_as(what: str) -> Iterator[None]:
    """Turn any failure of a library into a DynexportError of one line that starts with ``what``."""
    try:
        yield
    except DynexportError:
        raise
    except BaseException as error:
        # A Rust panic in tokenizers does not derive from Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DynexportError(f"{what}: {_reason(error)}") from error
        raise


def _reason(error: BaseException) -> str:
    """A library's message as part of a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON else f"{text[:_REASON]} .."
