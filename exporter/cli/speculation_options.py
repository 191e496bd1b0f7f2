"""The options of speculative decoding, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dynexport.exporter.cli.arguments import options
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.speculation import MOST_DRAFTS, Speculation

# What ``--speculate`` stands for without a number.
_MEASURED = "measured"


def speculation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--speculate`` and ``--draft`` to a command."""
    return options(
        click.option(
            "--speculate",
            metavar="[K]",
            is_flag=False,
            flag_value=_MEASURED,
            help="Draft up to K tokens a step and verify them in one call, where that is expected to be faster; the "
            f"text stays the same.  [without K: what calibrate --speculate found, else {Speculation().most}]",
        ),
        click.option(
            "--draft",
            metavar="DEPTH",
            help="With --speculate: the ratio or name of the depth that drafts.  [default: no layers; what followed "
            "the last tokens before in the prompt or the answer, or in the texts of calibrate --ngrams]",
        ),
    )(command)


def asked_speculation(bundle: Bundle, most: str | None, draft: str | None, depth: Depth) -> Speculation | None:
    """Return how tokens are drafted; None without ``--speculate``.

    Args:
        bundle: the bundle.
        most: the value of ``--speculate``.
        draft: the value of ``--draft``.
        depth: the depth that verifies.

    Raises:
        click.UsageError: for ``--draft`` without ``--speculate``.
        DynexportError: for a number that is none or out of range, or a depth that the bundle does not declare or that
            runs no fewer layers than the one that verifies.
    """
    if most is None:
        if draft is not None:
            raise click.UsageError("--draft: expected with --speculate, found without")
        return None
    drafter = None if draft is None else bundle.depth(draft)
    if drafter is not None and len(drafter.keep) >= len(depth.keep):
        raise DynexportError(
            f"--draft: expected a depth of fewer layers than {depth.name} ({len(depth.keep)}), which verifies, found "
            f"{drafter.name} ({len(drafter.keep)})"
        )
    if most == _MEASURED:
        return _measured(bundle, depth) if drafter is None else Speculation(depth=drafter)
    return Speculation(_number(most, bundle.manifest.model.max_length), drafter)


def _measured(bundle: Bundle, depth: Depth) -> Speculation:
    """Return what the bundle says of drafts at full depth, without its layers where a depth has no more."""
    found = Speculation.of(bundle.manifest)
    drafts = found.depth is not None and len(found.depth.keep) < len(depth.keep)
    return found if drafts else Speculation(found.most)


def _number(text: str, context: int) -> int:
    """Return the most drafts of a step; a draft needs a place in the context behind the token before it."""
    most = min(MOST_DRAFTS, context - 1)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise DynexportError(f"--speculate: expected a number of drafts, 1..{most}, found {text:.40}")
    return int(text)


__all__ = ["asked_speculation", "speculation_options"]
