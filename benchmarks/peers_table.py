"""Figures and Markdown tables of benchmarks/peers.py, from the rows of its measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers_list import GROUPS, Peer

Array = np.ndarray
Row = dict[str, Any]


def figures(rows: Sequence[Row], base: Sequence[Row], quiet: float) -> Row:
    """Return the figures of one label's rows: medians over quiet rounds, and ratios paired with the base's rows."""
    if failed := [row["error"] for row in rows if "error" in row]:
        return {"error": failed[0]}
    found: Row = {"rounds": len(rows)}
    for phase, taken in (("prefill", "others_prefill"), ("steps", "others_decode")):
        times = {row["round"]: time_of(row, phase) for row in rows if calm(row, taken, quiet)}
        theirs = {row["round"]: time_of(row, phase) for row in base if "error" not in row and calm(row, taken, quiet)}
        pairs = [times[number] / theirs[number] for number in times if number in theirs]
        name = {"prefill": "prefill", "steps": "decode"}[phase]
        found[f"{name}_milliseconds"] = 1e3 * statistics.median(times.values()) if times else None
        found[f"{name}_ratio"] = statistics.median(pairs) if pairs else None
        found[f"{name}_rounds"] = len(times)
    found["load_seconds"] = statistics.median(row["load"] for row in rows)
    found["peak_bytes"] = statistics.median(row["peak"] for row in rows)
    shares = [row[taken] for row in rows for taken in ("others_prefill", "others_decode") if row[taken] is not None]
    found["others_share"] = max(shares, default=None)
    found["versions"] = rows[-1]["versions"]
    return found


def time_of(row: Row, phase: str) -> float:
    """Return a process's time in seconds: the least prompt, the 25th percentile of the steps."""
    return min(row["prefill"]) if phase == "prefill" else float(np.quantile(row["steps"], 0.25))


def calm(row: Row, taken: str, quiet: float) -> bool:
    """Return whether other processes left a row undisturbed; an unknown share counts as calm."""
    return row[taken] is None or row[taken] <= quiet


def quality(logits: Array, reference: Array, windows: Array) -> Row:
    """Return the mean KL divergence from a reference's logits and the perplexity.

    Args:
        logits: float32 [windows, tokens, vocabulary].
        reference: logits of the reference, of the same shape.
        windows: int64 [windows, tokens].
    """
    divergences, losses = [], []
    for own, true, ids in zip(logits, reference, windows, strict=True):
        q, p = log_softmax(own), log_softmax(true)
        divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
        losses.append(-q[np.arange(len(ids) - 1), ids[1:]])
    # Of equal logits it is 0 up to rounding.
    return {"kl": max(0.0, float(np.mean(divergences))), "perplexity": math.exp(np.mean(losses))}


def log_softmax(logits: Array) -> Array:
    """Return log probabilities along the last axis."""
    shifted = np.asarray(logits, np.float32) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def table(peers: Sequence[Peer], shape: str, summary: Mapping[str, Row], quality_of: Mapping[str, Row]) -> list[str]:
    """Return the lines of a Markdown table for one shape, by group."""
    head = (
        "",
        "Prefill, ms",
        "Ratio",
        "Decode, ms",
        "Ratio",
        "Load, s",
        "Peak, MB",
        "KL",
        "Perplexity",
        "Quiet rounds",
    )
    lines = [f"{shape.replace('x', ' tokens, ')} rows", "", line(head), line(["---"] * len(head))]
    for group in GROUPS:
        for peer in (peer for peer in peers if peer.group == group):
            row, good = summary[peer.label], quality_of.get(peer.label, {})
            if "error" in row:
                lines.append(line([peer.label, row["error"], *[""] * (len(head) - 2)]))
                continue
            quiet = f"{row['prefill_rounds']}, {row['decode_rounds']} of {row['rounds']}"
            cells = [
                number(row["prefill_milliseconds"], ".0f"),
                number(row["prefill_ratio"], ".2f"),
                number(row["decode_milliseconds"], ".2f"),
                number(row["decode_ratio"], ".2f"),
                number(row["load_seconds"], ".2f"),
                number(row["peak_bytes"] / 1e6, ".0f"),
                good.get("error", number(good.get("kl"), ".4f")),
                number(good.get("perplexity"), ".1f"),
                quiet,
            ]
            lines.append(line([peer.label, *cells]))
    return lines


def line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None, form: str) -> str:
    """Return a number as text; nothing without one."""
    return "" if value is None else format(value, form)


def base_of(peer: Peer, peers: Sequence[Peer]) -> Peer | None:
    """Return what a line is compared with: the first bundle of its group, else the first in fp32."""
    ours = [each for each in peers if each.engine == "dynexport"]
    return next((each for group in (peer.group, "fp32") for each in ours if each.group == group), None)


def summarised(peers: Sequence[Peer], rows: Sequence[Row], shape: str, home: Path, quiet: float) -> dict[str, Row]:
    """Return the figures of every peer at a shape; what is missing is named."""
    found = {}
    for peer in peers:
        base = base_of(peer, peers)
        mine, its = (
            [row for row in rows if each is not None and (row["label"], row["shape"]) == (each.label, shape)]
            for each in (peer, base)
        )
        missing = peer.missing(home)
        found[peer.label] = figures(mine, its, quiet) if mine else {"error": missing or "not measured"}
    return found


def versions_text(summary: Mapping[str, Row]) -> str:
    """Return all versions as text."""
    return ", ".join(sorted({f"{k} {v}" for row in summary.values() for k, v in row.get("versions", {}).items()}))
