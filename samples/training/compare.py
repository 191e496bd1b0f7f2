"""Compare the held-out loss of every trained checkpoint with the layers that it runs, as table and picture.

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
# Of the held-out windows, every so many: enough for differences of a hundredth.
STRIDE = 3

Evaluate = Callable[[Checkpoint, heldout.Rows], heldout.Outcome]


@dataclass(frozen=True)
class Way:
    """A row of the table: a checkpoint, and how it is run.

    Attributes:
        causal: whether a generation can run so.
        label: of its point in the picture.
        color: of its point in the picture.
        shift: of its label from its point.
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
        depth: mean layers that a token runs in.
        loss: nats per token.
        above_dense: loss minus that of the dense model, and the standard error of this difference over windows.
        agreement, overflow: shares, of causal routing only.
        steps, tokens, flops: of the checkpoint's training, with that of the trunk or the teacher.
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
    """Evaluate every way."""
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
    """Return steps and operations of a checkpoint's training, with those of the trunk or the teacher it starts from."""
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
    """Return the results in Markdown."""
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
    """Evaluate, and write the table, the results and the picture."""
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
