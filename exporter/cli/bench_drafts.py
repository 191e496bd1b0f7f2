"""What ``dynexport bench --speculate`` measures and prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynexport.exporter.cli.output import Output
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import Machine
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.speculation import Speculation
from dynexport.runtime.measure.speculated import LEAST_GAIN, DraftedWork, Speculated, measure_drafts

COLUMNS = ["", "drafts", "accepted", "tokens a step", "ms a token", "with drafts", "gain", "ideal", "efficiency"]
# Groups of prompts that are answered, if the text has as many.
GROUPS = 4


def bench_drafts(out: Output, bundle: Bundle, text: Sequence[int] | None, speculation: Speculation, how: Any) -> None:
    """Time decoding with drafts beside decoding without, print the result and write the report.

    Args:
        out: output of the command.
        bundle: the bundle.
        text: token ids that prompts are taken from; None for random ones.
        speculation: how tokens are drafted.
        how: the command's options: prompt_tokens, new_tokens, batch, repeats, depth, backend, weights and threads.
    """
    model = Model(bundle, how["threads"], backend=how["backend"], weights=how["weights"])
    depth: Depth = how["depth"]
    groups = _groups(bundle.manifest.model.vocab_size, text, how["batch"], how["prompt_tokens"])
    work = DraftedWork(groups, how["new_tokens"], depth, how["repeats"])
    with out.progress("measuring") as bar:
        (found,) = measure_drafts(model, work, [speculation], progress=bar.update)
    out.say(
        f"{bundle.manifest.precision}, {len(groups)} times {how['batch']} prompts of {how['prompt_tokens']} tokens, up "
        f"to {how['new_tokens']} new ones, {how['threads']} threads, medians of {how['repeats']} repetitions, in turn"
    )
    out.table(f"{bundle.path}: decoding at {depth.name}", COLUMNS, [figures(found)])
    warn_of_drafts(out, found)
    if text is None:
        out.warn("random prompts: their continuations say little of a text's drafts; give --text")
    out.report({"machine": Machine.this().model_dump(), "depth": depth.name, **found.model_dump()})


def figures(found: Speculated) -> list[str]:
    """Return a row of the table ``COLUMNS``."""
    lower, upper = found.gain_quartiles
    spread = "" if lower == upper else f" ±{(upper - lower) / 2 / found.gain:.0%}"
    return [
        found.drafter,
        f"up to {found.most}",
        "none" if found.acceptance is None else f"{found.acceptance:.0%}",
        f"{found.tokens_per_step:.2f}",
        f"{found.plain_milliseconds:.2f}",
        f"{found.milliseconds:.2f}",
        f"{found.gain:.2f}x{spread}",
        f"{found.ideal_gain:.2f}x",
        f"{found.efficiency:.2f}",
    ]


def warn_of_drafts(out: Output, found: Speculated) -> None:
    """Print what a reader of the gain has to know: a loss, texts that differ."""
    if found.gain < LEAST_GAIN:
        out.warn(f"{found.drafter}: slower with drafts: {found.gain:.2f}x, expected at least {LEAST_GAIN}x")
    if found.same_texts < found.texts:
        out.say(
            f"{found.texts - found.same_texts} of {found.texts} texts differ: calls of several tokens round otherwise, "
            "which decides between tokens of nearly equal logits (docs/speculation.md)"
        )


def _groups(vocabulary: int, text: Sequence[int] | None, batch: int, tokens: int) -> list[list[list[int]]]:
    """Return up to four groups of ``batch`` prompts of ``tokens`` tokens."""
    needed = checked_count("batch", batch) * checked_count("prompt_tokens", tokens)
    if text is None:
        text = np.random.default_rng(0).integers(0, vocabulary, GROUPS * needed).tolist()
    if len(text) < needed:
        raise DynexportError(f"text: expected at least {needed} tokens for the prompts, found {len(text)}")
    prompts = [list(text[first : first + tokens]) for first in range(0, len(text) - tokens + 1, tokens)]
    return [prompts[first : first + batch] for first in range(0, len(prompts) - batch + 1, batch)][:GROUPS]


__all__ = ["COLUMNS", "GROUPS", "bench_drafts", "figures", "warn_of_drafts"]
