"""Measure a checkpoint's held-out loss and depth with the PyTorch reference of `dynexport verify`.

The held-out text is split into windows, each with a prompt. The tokens after the prompt run like generated tokens, one
by one, and only they count: the loss of their next tokens, and the number of layers that they run.
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
        depth: mean number of layers that a token runs.
        agreement: share of the causal rule's decisions that equal top-k's; None without such a rule.
        overflow: share of the tokens routed to a layer that found its cache full; None without such a rule.
    """

    losses: NDArray[np.float64]
    depth: float
    agreement: float | None = None
    overflow: float | None = None


def dense(checkpoint: Checkpoint, rows: Rows, ratio: float = 1) -> Outcome:
    """Run prompts in every layer and later tokens in the layers that unified-skip keeps at ``ratio``; 1 keeps all."""
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
    """Run by the training rule, top-k over the whole window, which generation cannot use: it is not causal."""
    contract = _mod(checkpoint).model_copy(update={"prefill": "topk"})
    losses, routes = _routed(checkpoint, rows, contract, WINDOW)
    return Outcome(losses, _depth(contract, routes))


def radial(checkpoint: Checkpoint, rows: Rows) -> Outcome:
    """Run along the paths that the checkpoint's routers choose, prompts included."""
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
    """Return the mean cross-entropy of the next tokens after the prompt, nats."""
    scores = logits[PROMPT:-1].astype(np.float64)
    most = scores.max(axis=-1, keepdims=True)
    normalizer = most[:, 0] + np.log(np.exp(scores - most).sum(axis=-1))
    return float(np.mean(normalizer - scores[np.arange(len(scores)), row[PROMPT + 1 :]]))
