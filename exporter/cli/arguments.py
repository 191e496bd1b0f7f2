"""Values as people type them on the command line."""

from __future__ import annotations

import click


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas; none of an empty text.

    Raises:
        click.BadParameter: when one is none; it names ``option``.
    """
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise click.BadParameter(
            f"expected whole numbers separated by commas, found {text!r:.80}", param_hint=option
        ) from error
