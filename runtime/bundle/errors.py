"""The exception class that users see, and the exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_GOOD = 0
EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2
# Most characters of an error. A longer one loses its middle: it starts with the place and ends with the advice.
_LONGEST, _END = 900, 300
# Most characters of a library's own message in an error.
_REASON = 300


class DynexportError(Exception):
    """A usage or input error, in one line: what, where, expected and found, what to do.

    The message may quote hostile input, so control characters are escaped and its length is bounded.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RouteError(DynexportError):
    """A route that the contract defines as an error, such as a token that finds a layer's cache full."""


def one_line(text: str) -> str:
    """Return a text with control characters escaped, and the middle removed if it is too long."""
    return _shortened(printable(_shortened(text)))


def printable(text: str) -> str:
    """Return a text with line breaks and control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _END - 4]} .. {text[-_END:]}"


def require_module(name: str, extra: str, purpose: str) -> object:
    """Import and return an optional module; if it is missing, the error says how to install it.

    Args:
        name: the module to import, such as ``"torch"``.
        extra: the extra of this distribution that installs it.
        purpose: the purpose, as the end of "is needed to ...".

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
    """Turn any exception of a library into a one-line DynexportError that starts with ``what``."""
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
    """Return a library's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON else f"{text[:_REASON]} .."
