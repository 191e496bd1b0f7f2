"""The options of speculative decoding, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dynexport.exporter.cli.arguments import options
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.speculation import Speculation


def speculation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--speculate`` and ``--draft`` to a command."""
    return options(
        click.option(
            "--speculate",
            metavar="[K]",
            type=int,
            is_flag=False,
            flag_value=Speculation().most,
            help="Draft up to K tokens a step and verify them in one call, where that is expected to be faster; the "
            f"text stays the same.  [without K: {Speculation().most}]",
        ),
        click.option(
            "--draft",
            metavar="DEPTH",
            help="With --speculate: the ratio or name of the depth that drafts.  [default: no layers; what followed "
            "the last tokens before in the prompt or the answer]",
        ),
    )(command)


def asked_speculation(bundle: Bundle, most: int | None, draft: str | None) -> Speculation | None:
    """Return how tokens are drafted; None without ``--speculate``.

    Raises:
        click.UsageError: for ``--draft`` without ``--speculate``.
        DynexportError: for a number out of range, or a depth that the bundle does not declare.
    """
    if most is None:
        if draft is not None:
            raise click.UsageError("--draft: expected with --speculate, found without")
        return None
    return Speculation(most, None if draft is None else bundle.depth(draft))


__all__ = ["asked_speculation", "speculation_options"]
