"""Compare the trained checkpoints: held-out loss against the mean number of layers, as a table and a picture.

    python samples/training/compare.py

Writes results.json, the table in README.md and docs/training.md, and docs/images/depth-and-loss.svg.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import heldout
import numpy as np
import picture
import text
import torch
from recipes import LAYERS, RECIPES, WINDOW
from tokenizers import Tokenizer
from train import CHECKPOINTS, ROWS, before, budget

from dynexport.exporter.checkpoint import Checkpoint, open_checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGES = (HERE / "README.md", ROOT / "docs" / "training.md")
PICTURE = ROOT / "docs" / "images" / "depth-and-loss.svg"
# Evaluate every third held-out window: enough to see loss differences of 0.01.
STRIDE = 3

Evaluate = Callable[[Checkpoint, heldout.Rows], heldout.Outcome]


@dataclass(frozen=True)
class Way:
    """A row of the table: a checkpoint and a way to run it.

    Attributes:
        name: the row's title.
        checkpoint: the folder's name.
        evaluate: runs the checkpoint on held-out text.
        causal: true if generation can run this way.
        label: the label of its point in the picture.
        color: the color of the point.
        shift: the label's offset from the point.
    """

    name: str
    checkpoint: str
    evaluate: Evaluate
    causal: bool = True
    label: str = ""
    color: str = ""
    shift: tuple[float, float] = (10.0, 0.0)


GREY, PALE, BLUE, GREEN, VIOLET, ORANGE = "#5b6875", "#9aa5b1", "#3b73c9", "#2f8f5b", "#8059c2", "#c26a1b"
WAYS = (
    Way("dense", "dense", heldout.dense, True, "dense", GREY, (-10, 10)),
    Way("dense run at 2x, untrained for it", "dense", partial(heldout.dense, ratio=2), True, "2x untrained", PALE),
    Way("dense run at 3x, untrained for it", "dense", partial(heldout.dense, ratio=3), True, "3x untrained", PALE),
    Way("Unified Skip 2x", "skip-2", heldout.skipping, True, "Unified Skip 2x", BLUE, (-4, 14)),
    Way("Unified Skip 3x", "skip-3", heldout.skipping, True, "Unified Skip 3x", BLUE, (-10, 0)),
    Way("MoD, router", "mod", heldout.routed, True, "MoD, router (hollow: top-k)", GREEN, (10, -8)),
    Way("MoD, top-k, not causal", "mod", heldout.routed_by_top_k, False, "", GREEN),
    Way("MoD, predictor", "mod-predictor", heldout.routed, True, "MoD, predictor (hollow: top-k)", VIOLET, (10, 6)),
    Way("MoD with predictor, top-k, not causal", "mod-predictor", heldout.routed_by_top_k, False, "", VIOLET),
    Way("Radial, from scratch", "radial", heldout.radial, True, "Radial, from scratch", ORANGE, (-10, -4)),
    Way("Radial, distilled", "radial-distilled", heldout.radial, True, "Radial, distilled", ORANGE),
)


@dataclass(frozen=True)
class Result:
    """The numbers of a row of the table.

    Attributes:
        name: the row's title.
        checkpoint: the folder's name.
        depth: mean number of layers that a token runs.
        loss: nats per token.
        above_dense: the loss minus the dense model's.
        standard_error: the standard error of ``above_dense`` over windows.
        agreement: share of causal decisions that equal top-k's; None without causal routing.
        overflow: share of tokens that found a cache full; None without causal routing.
        steps: training steps, including those of the trunk or the teacher.
        tokens: training tokens, counted in the same way.
        flops: training operations, counted in the same way.
    """

    name: str
    checkpoint: str
    depth: float
    loss: float
    above_dense: float
    standard_error: float
    agreement: float | None
    overflow: float | None
    steps: int
    tokens: int
    flops: float


def results() -> list[Result]:
    """Evaluate every way of running a checkpoint."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "dense" / "tokenizer.json"))
    rows = text.windows(text.tokens(tokenizer, held_out=True), WINDOW)[::STRIDE].tolist()
    found: list[Result] = []
    baseline = np.zeros(len(rows))
    for way in WAYS:
        outcome = way.evaluate(open_checkpoint(str(CHECKPOINTS / way.checkpoint)), rows)
        if not found:
            baseline = outcome.losses
        difference = outcome.losses - baseline
        steps, flops = training(way.checkpoint)
        result = Result(
            way.name,
            way.checkpoint,
            depth=round(outcome.depth, 3),
            loss=round(float(outcome.losses.mean()), 4),
            above_dense=round(float(difference.mean()), 4),
            standard_error=round(float(difference.std(ddof=1) / np.sqrt(len(rows))), 4),
            agreement=None if outcome.agreement is None else round(outcome.agreement, 4),
            overflow=None if outcome.overflow is None else round(outcome.overflow, 6),
            steps=steps,
            tokens=steps * ROWS * WINDOW,
            flops=flops,
        )
        print(result.name, result.depth, result.loss, flush=True)
        found.append(result)
    return found


def training(checkpoint: str) -> tuple[int, float]:
    """Return a checkpoint's training steps and operations, including those of its trunk or teacher."""
    recipe = RECIPES[checkpoint]
    steps, flops = _curve_end(checkpoint)
    earlier = recipe.teacher or recipe.trunk
    if earlier:
        earlier_steps, earlier_flops = _curve_end(earlier)
        steps += math.ceil(before(recipe) * budget() * earlier_steps / earlier_flops)
    return steps, flops


def _curve_end(checkpoint: str) -> tuple[int, float]:
    with (CHECKPOINTS / checkpoint / "loss.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return int(last["step"]), float(last["flops"])


def table(found: list[Result]) -> str:
    """Return the results as a Markdown table."""
    heads = (
        "Model, and how it runs",
        "Layers per token",
        "Held-out loss",
        "Above dense",
        "As top-k",
        "Training tokens",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|"]
    for result in found:
        above = f"{result.above_dense:+.3f} ± {result.standard_error:.3f}" if result.standard_error else ""
        agreement = "" if result.agreement is None else f"{result.agreement:.1%}"
        lines.append(
            f"| {result.name} | {result.depth:.2f} | {result.loss:.3f} | {above} | {agreement} "
            f"| {result.tokens / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def put(page: Path, content: str) -> None:
    """Replace the text between a page's two marks."""
    before, first, rest = page.read_text().partition("<!-- table: samples/training/compare.py -->\n")
    _, last, after = rest.partition("<!-- end of table -->\n")
    assert first and last, f"{page}: expected the two marks of the table"
    page.write_text(f"{before}{first}{content}\n{last}{after}")


def main() -> None:
    """Evaluate the checkpoints and write results, tables and picture."""
    torch.set_num_threads(1)
    found = results()
    RESULTS.write_text(json.dumps([asdict(result) for result in found], indent=2) + "\n")
    for page in PAGES:
        put(page, table(found))
    points = [
        picture.Point(way.label, result.depth, result.loss, way.color, way.causal, way.shift)
        for way, result in zip(WAYS, found, strict=True)
    ]
    picture.draw(points, LAYERS, PICTURE)


if __name__ == "__main__":
    main()
