"""Arguments that several commands share, and values as people type them."""

from __future__ import annotations

from pathlib import Path

import click

from dynexport.runtime.machine import available_cores

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
threads_option = click.option(
    "--threads", type=int, default=available_cores, show_default="all cores", help="Threads of ONNX Runtime."
)


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
