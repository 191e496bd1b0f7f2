"""Measure held-out loss and realised depth of a checkpoint with the PyTorch reference of `dynexport verify`.

Each window of held-out text begins with a prompt; the tokens after it are fed back one by one, as generated ones would
be, and only they count: the loss is that of the tokens after them, the depth is the layers that they run in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from recipes import LAYERS, WINDOW

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.reference import Reference, RowRoutes
from dynexport.exporter.strategies.mod.reference import ModReference, top_k
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.exporter.strategies.unified_skip import kept_layers
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime.bundle.contract import Mod, Radial, UnifiedSkip, parse_contract

Rows = list[list[int]]

PROMPT = 64
BATCH = 16


@dataclass(frozen=True)
class Outcome:
    """The result of one way of running a checkpoint.

    Attributes:
        losses: float64 [windows], nats per token.
        depth: mean layers that a token runs in.
        agreement: share of the causal rule's decisions that top-k would take too; None without such a rule.
        overflow: share of the tokens that chose a layer and found its cache full; None without such a rule.
    """

    losses: NDArray[np.float64]
    depth: float
    agreement: float | None = None
    overflow: float | None = None


def dense(checkpoint: Checkpoint, rows: Rows, ratio: float = 1) -> Outcome:
    """Run prompts in every layer, and the tokens after them in the layers that Unified Skip keeps at ``ratio``."""
    keep = kept_layers("official", ratio, LAYERS)
    runs = unified_skip_runs(PROMPT, WINDOW, keep, LAYERS)
    reference = Reference.from_checkpoint(checkpoint)
    losses = [
        _loss(logits, row)
        for batch in _batches(rows)
        for logits, row in zip(reference.logits(batch, [runs] * len(batch)), batch, strict=True)
    ]
    return Outcome(np.array(losses), len(keep))


def skipping(checkpoint: Checkpoint, rows: Rows) -> Outcome:
    """Run at the ratio that the checkpoint's contract declares."""
    contract = parse_contract(checkpoint.config["dynexport"], checkpoint.source)
    assert isinstance(contract, UnifiedSkip)
    return dense(checkpoint, rows, contract.speedups[0])


def routed(checkpoint: Checkpoint, rows: Rows) -> Outcome:
    """Run by the causal rule of the checkpoint's contract, prompts included."""
    contract = _mod(checkpoint)
    losses, routes = _routed(checkpoint, rows, contract, PROMPT)
    same = [
        top_k(contract, score)[0] == chosen
        for row in routes
        for score, chosen in zip(row.score, row.chosen, strict=True)
    ]
    turned_away = sum(int(row.overflow.sum()) for row in routes)
    ran = sum(int(row.chosen.sum()) for row in routes)
    return Outcome(losses, _depth(contract, routes), float(np.mean(same)), turned_away / (turned_away + ran))


def routed_by_top_k(checkpoint: Checkpoint, rows: Rows) -> Outcome:
    """Run by the rule of training: the k largest scores of the whole window, which generation cannot know."""
    contract = _mod(checkpoint).model_copy(update={"prefill": "topk"})
    losses, routes = _routed(checkpoint, rows, contract, WINDOW)
    return Outcome(losses, _depth(contract, routes))


def radial(checkpoint: Checkpoint, rows: Rows) -> Outcome:
    """Run the paths that the checkpoint's routers choose, prompts included."""
    contract = parse_contract(checkpoint.config["dynexport"], checkpoint.source)
    assert isinstance(contract, Radial)
    reference = RadialReference.from_checkpoint(checkpoint, contract=contract)
    losses: list[float] = []
    depths: list[NDArray[np.int64]] = []
    for batch in _batches(rows):
        logits, paths = reference.routed_logits(batch)
        losses += [_loss(of_row, row) for of_row, row in zip(logits, batch, strict=True)]
        depths += [row.depth[PROMPT:-1] for row in paths]
    return Outcome(np.array(losses), float(np.mean(depths)))


def _mod(checkpoint: Checkpoint) -> Mod:
    contract = parse_contract(checkpoint.config["dynexport"], checkpoint.source)
    assert isinstance(contract, Mod)
    return contract


def _routed(
    checkpoint: Checkpoint, rows: Rows, contract: Mod, prompt: int
) -> tuple[NDArray[np.float64], list[RowRoutes]]:
    reference = ModReference.from_checkpoint(checkpoint, contract=contract, max_length=WINDOW)
    losses: list[float] = []
    routes: list[RowRoutes] = []
    for batch in _batches(rows):
        logits, more = reference.routed_logits(batch, [[(0, prompt)]] * len(batch))
        losses += [_loss(of_row, row) for of_row, row in zip(logits, batch, strict=True)]
        routes += more
    return np.array(losses), routes


def _depth(contract: Mod, routes: list[RowRoutes]) -> float:
    chosen = np.stack([row.chosen[:, PROMPT:-1] for row in routes])
    return LAYERS - len(contract.routed_layers) + float(chosen.mean(axis=(0, 2)).sum())


def _batches(rows: Rows) -> Iterator[Rows]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _loss(logits: NDArray[np.float32], row: list[int]) -> float:
    """Return the mean cross-entropy of the tokens that follow those after the prompt, in nats."""
    scores = logits[PROMPT:-1].astype(np.float64)
    most = scores.max(axis=-1, keepdims=True)
    normalizer = most[:, 0] + np.log(np.exp(scores - most).sum(axis=-1))
    return float(np.mean(normalizer - scores[np.arange(len(scores)), row[PROMPT + 1 :]]))
