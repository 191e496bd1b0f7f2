"""Compare bundles with llama.cpp, OpenVINO and onnxruntime-genai on one checkpoint: speed, memory, quality.

    python benchmarks/peers.py --install --prepare model.gguf        # once: venvs and models under build/peers
    python benchmarks/peers.py --ours fp32=build/dense-fp32 --ours int8=build/dense-int8 \\
      --ours 4-bit=build/dense-int4 --ours 4-bit=build/skip-int4@2 --text text.txt --rounds 5 --json peers.json

Each measurement is a process of its own, all in turn within a round. Ratios are paired: the peer's time / that of the
first bundle of its group (of fp32 where a group has none) in the same round, the median over rounds; above 1 the bundle
is faster. Prompts: the least of a process; steps: its 25th percentile; then medians over rounds. Rounds in which other
processes took more than --quiet of the machine are left out, and the table says how many remain. Quality is over
windows of --text, against the first fp32 bundle. Groups: fp32, bf16, int8, 4-bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from peers_list import GROUPS, Peer, others, our_bundle
from peers_prepare import PACKAGES, Failed, install, prepare, run
from peers_table import Row, quality, summarised, table, versions_text

from dynexport.exporter.cli.arguments import read_text
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import Machine

Array = np.ndarray


def shape_of(text: str) -> tuple[int, int]:
    """Return (prompt tokens, rows) of a text such as 256x8."""
    tokens, _, rows = text.partition("x")
    if not (tokens.isdigit() and rows.isdigit() and int(tokens) and int(rows)):
        raise argparse.ArgumentTypeError(f"expected TOKENSxROWS such as 256x1, found {text!r}")
    return int(tokens), int(rows)


def measure(command: Sequence[str], label: str) -> Row:
    """Run one measurement and return its figures, or {"error": ..} where it failed."""
    try:
        return json.loads(run(list(command), label).strip().splitlines()[-1])
    except (Failed, IndexError, ValueError) as error:
        return {"error": str(error).removeprefix(f"{label}: ")}


def in_turn(commands: Mapping[str, Sequence[str]], rounds: Sequence[int], shape: str) -> list[Row]:
    """Measure every label once per round; return rows with label, round and shape."""
    rows = []
    for number in rounds:
        for label, command in commands.items():
            say(f"{shape}, round {number + 1}: {label}")
            rows.append({"label": label, "round": number, "shape": shape, **measure(command, label)})
    return rows


def qualities(peers: Sequence[Peer], options: argparse.Namespace) -> dict[str, Row]:
    """Return KL and perplexity by label; {"error": ..} where one failed. Raises Failed without a reference."""
    true = next((peer for peer in options.ours if peer.group == "fp32"), None)
    if true is None:
        raise Failed("--text: expected a bundle of the group fp32 in --ours, which quality is measured against")
    windows = text_windows(true.model, options.text, options.windows, options.window)
    with tempfile.TemporaryDirectory() as directory:
        ids, into, reference = (Path(directory) / name for name in ("ids.npy", "logits.npy", "reference.npy"))
        np.save(ids, windows)
        write_logits(true, options, ids, reference)
        found: dict[str, Row] = {}
        for peer in peers:
            try:
                if peer is not true:
                    write_logits(peer, options, ids, into)
                own, its = (np.load(at, mmap_mode="r") for at in (reference if peer is true else into, reference))
                found[peer.label] = quality(own, its, windows)
            except Failed as error:
                found[peer.label] = {"error": str(error)}
    return found


def write_logits(peer: Peer, options: argparse.Namespace, ids: Path, into: Path) -> None:
    """Let a peer write its logits of windows of ids. Raises Failed."""
    say(f"quality: {peer.label}")
    run([*peer.command(options.home), f"--threads={options.threads}", "--logits", str(ids), str(into)], peer.label)


def text_windows(bundle: Path, text: Path, count: int, length: int) -> Array:
    """Return the beginning of a text in windows of ids, int64 [count, length]."""
    from dynexport.runtime import Bundle
    from dynexport.runtime.text.text import Text

    ids = Text.of_bundle(Bundle.open(bundle)).encode(read_text(text, count * length))
    if len(ids) < count * length:
        raise Failed(f"{text}: expected at least {count * length} tokens, found {len(ids)}")
    return np.array(ids[: count * length], np.int64).reshape(count, length)


def main() -> int:
    """Install and prepare if asked, measure, print the tables; 1 if a measurement failed."""
    options = arguments()
    engines = [name for name in ("dynexport", *PACKAGES) if not options.only or name in options.only]
    try:
        if options.install:
            install(options.home, engines, say)
        if options.prepare:
            prepare(options.home, options.prepare, engines, say)
        return compare(engines, options) if options.ours else 0
    except (Failed, DynexportError, OSError) as error:
        sys.exit(f"error: {error}")


def compare(engines: Sequence[str], options: argparse.Namespace) -> int:
    """Measure bundles and peers, print the tables; 1 if a measurement failed."""
    peers = [*options.ours, *others(options.home / "models")]
    peers = [peer for peer in peers if peer.engine in engines and (not options.group or peer.group in options.group)]
    there = [peer for peer in peers if peer.missing(options.home) is None]
    before: Row = {"rows": [], "quality": {}}
    if options.add and options.json and options.json.exists():
        before = json.loads(options.json.read_text())
    rows: list[Row] = before["rows"]
    shapes = [f"{tokens}x{count}" for tokens, count in options.shape]
    for shape, (tokens, count) in zip(shapes, options.shape, strict=True):
        sizes = [f"--prompt={tokens}", f"--batch={count}", f"--new={options.new}", f"--threads={options.threads}"]
        commands = {peer.label: [*peer.command(options.home), *sizes, f"--repeats={options.repeats}"] for peer in there}
        first = 1 + max((row["round"] for row in rows if row["shape"] == shape), default=-1)
        rows += in_turn(commands, range(first, first + options.rounds), shape)
    good = before["quality"] | (qualities(there, options) if options.text else {})
    return report(peers, rows, good, shapes, options)


def report(
    peers: Sequence[Peer], rows: Sequence[Row], good: dict[str, Row], shapes: Sequence[str], options: argparse.Namespace
) -> int:
    """Print the tables, write the JSON; return 1 if a measurement failed."""
    machine, summaries = Machine.this(), {}
    for shape in shapes:
        summaries[shape] = summarised(peers, rows, shape, options.home, options.quiet)
        print("\n".join(table(peers, shape, summaries[shape], good)), end="\n\n")
        shares = [row["others_share"] for row in summaries[shape].values() if row.get("others_share") is not None]
        if shares:
            print(f"Other processes took at most {max(shares):.1%} of the machine in a measurement.")
        print(
            f"{machine.cpu}, {options.threads} of {machine.cores} cores; {versions_text(summaries[shape])}", end="\n\n"
        )
    if options.json:
        plain = {"machine": machine.model_dump(), "threads": options.threads, "quiet": options.quiet}
        options.json.write_text(json.dumps({**plain, "summary": summaries, "quality": good, "rows": rows}, indent=1))
    return int(any("error" in row for row in (*rows, *good.values())))


def arguments() -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--home", type=Path, default=Path("build/peers"), help="venvs and models  [build/peers]")
    add("--install", action="store_true", help="make the venvs that are missing; llama.cpp compiles for minutes")
    add("--prepare", type=Path, metavar="GGUF", help="write the models of all peers, from this file")
    add("--ours", type=our_bundle, action="append", default=[], metavar="GROUP=BUNDLE[@DEPTH]", help="a bundle of ours")
    add("--only", action="append", choices=("dynexport", *PACKAGES), help="these engines only; repeatable")
    add("--group", action="append", choices=GROUPS, help="these groups only; repeatable")
    add("--shape", type=shape_of, action="append", metavar="TOKENSxROWS", help="prompt and rows; repeatable  [256x1]")
    add("--new", type=int, default=128, help="decode steps  [128]")
    add("--repeats", type=int, default=3, help="timed prompts of a process  [3]")
    add("--rounds", type=int, default=5, help="rounds; 0 with --add for the table alone  [5]")
    add("--threads", type=int, default=2)
    add("--quiet", type=float, default=0.08, help="share of others above which a round is left out  [0.08]")
    add("--text", type=Path, help="UTF-8 text for KL and perplexity")
    add("--windows", type=int, default=6)
    add("--window", type=int, default=256)
    add("--json", type=Path, help="file for all rows and figures")
    add("--add", action="store_true", help="add to the rows of the file that --json names")
    options = parser.parse_args()
    options.shape = options.shape or [(256, 1)]
    if not (options.ours or options.install or options.prepare):
        parser.error("expected --ours GROUP=BUNDLE to measure, or --install and --prepare; found none")
    if wrong := [each for each in options.ours if not each.model.exists()]:
        parser.error(f"--ours: {wrong[0].model}: expected a bundle, found none")
    return options


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
