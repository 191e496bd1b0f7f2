"""Compare a Unified Skip adapter at each depth with the model without it: table and picture of docs/adapters.md.

    python samples/training/adapted.py MODEL ADAPTER --text book.txt -o build/adapted

Three bundles run the text: the model with layers left out evenly, with those of the adapter's order, and with the
adapter. The directory gets the bundles, results.json and depths.svg; bundles that are there are used again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from picture import Point, draw

from dynexport.exporter import convert
from dynexport.runtime import Bundle
from dynexport.runtime.measure.compared import compared_depths
from dynexport.runtime.measure.evaluate import Evaluation, evaluate
from dynexport.runtime.text.text import Text

COLORS = {"evenly": "#9aa5b1", "in order": "#d97706", "adapted": "#0f766e"}
SHIFTS = {"evenly": (9, 5), "in order": (9, 3), "adapted": (-9, -8)}


def bundles(model: str, adapter: Path, output: Path) -> dict[str, Path]:
    """Make the three bundles in float32, and return them by name."""
    contract = json.loads((adapter / "config.json").read_text())["dynexport"]
    if contract["strategy"] != "unified-skip":
        sys.exit(f"{adapter}: expected an adapter for unified-skip, found {contract['strategy']}: use dynexport eval")
    ways: dict[str, dict[str, Any]] = {
        "evenly": {"strategy": "unified-skip", "speedups": contract["speedups"], "rule": "balanced"},
        "in order": {"strategy": "unified-skip", "fields": contract},
        "adapted": {"adapter": adapter},
    }
    for name, options in ways.items():
        if not (output / name).exists():
            convert(model, output / name, precision="fp32", golden=False, **options)
    return {name: output / name for name in ways}


def measured(bundle: Path, text: Path, tokens: int, threads: int) -> list[Evaluation]:
    """Return the perplexity of decode steps at full depth and at every ratio, in windows of 256 after 32 of prompt."""
    opened = Bundle.open(bundle)
    ids = Text.of_bundle(opened).encode(text.read_text(encoding="utf-8"))[:tokens]
    depths = compared_depths(opened, None)
    return evaluate(opened, ids, depths=depths, prompt_tokens=32, max_tokens=tokens, threads=threads)


def main() -> None:
    """Print the table, and write results and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a .gguf file")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that the adapter was not trained on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    how = parser.parse_args()
    how.output.mkdir(parents=True, exist_ok=True)
    found = {
        name: measured(path, how.text, how.tokens, how.threads)
        for name, path in bundles(how.model, how.adapter, how.output).items()
    }
    dense = found["evenly"][0]
    print(f"{how.text.name}: {dense.tokens} decoded tokens, dense {dense.perplexity:.2f}")
    print("| Layers |", " | ".join(found), "|")
    for rows in zip(*found.values(), strict=True):
        ratios = [f"{row.perplexity:.2f} ({row.perplexity / dense.perplexity:.2f}x)" for row in rows]
        print(f"| {rows[0].layers} |", " | ".join(ratios), "|")
    report = {name: [row.model_dump() for row in rows] for name, rows in found.items()}
    (how.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    points = [Point("dense", dense.depth, dense.mean_loss, "#1f2933", True, (-9, -8))]
    for name, rows in found.items():
        points += [Point(name, row.depth, row.mean_loss, COLORS[name], True, SHIFTS[name]) for row in rows[1:]]
    draw(points, dense.layers, how.output / "depths.svg", least=points[-1].depth - 2)


if __name__ == "__main__":
    main()
