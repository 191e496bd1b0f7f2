"""The one exception that users see, and its exit codes."""

from __future__ import annotations

EXIT_GOOD = 0
EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2


class DynexportError(Exception):
    """Bad usage or input, told in one line: what, where, expected and found, what to do.

    Names and values of a hostile input may stand in it: what would break the line is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


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
