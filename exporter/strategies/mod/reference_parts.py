"""A layer of which tokens skip attention, the MLP or both, in PyTorch, for one row (docs/routing-contract.md, mod)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynexport.exporter.reference.hugging_face import BoolArray
from dynexport.exporter.strategies.mod.reference_routers import Parts, adapted
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError

# Runs transformers' layer on some tokens of the row, of which the indices are given: [tokens, hidden].
RunTokens = Callable[[Any], Any]


@dataclass(frozen=True)
class Verdict:
    """A router's decisions about a row's tokens.

    Attributes:
        runs: bool [tokens].
        score: float32 [tokens], the score r.
    """

    runs: BoolArray
    score: Any


def needs_parts(contract: Mod) -> bool:
    """Return whether a layer is more than a block that tokens run or skip as a whole."""
    plain = contract.target == "block" and contract.skipped_kv == "none" and contract.skip_branch == "none"
    return not plain or contract.gate in ("split", "affine")


def run_parts(
    contract: Mod, layer: Any, run: RunTokens, hidden: Any, verdicts: list[Verdict], adapter: Parts | None
) -> Any:
    """Return the hidden states [tokens, hidden] of a row after a layer.

    Args:
        contract: the contract.
        layer: transformers' layer.
        run: runs it, attention and MLP, on some tokens.
        hidden: float32 [tokens, hidden], before the layer.
        verdicts: of the layer's routers, attention's first.
        adapter: the tensors of the skip branch, or None.

    Raises:
        DynexportError: for a layer without the modules ``mlp`` and ``post_attention_layernorm``.
    """
    import torch

    mlp, norm = (getattr(layer, name, None) for name in ("mlp", "post_attention_layernorm"))
    if mlp is None or norm is None:
        raise DynexportError(
            f"target: expected a layer with mlp and post_attention_layernorm, found a {type(layer).__name__}"
        )
    everybody = np.ones(len(hidden), bool)
    attends = everybody if contract.target == "mlp" else verdicts[0].runs
    after = hidden.clone()
    present = everybody if contract.skipped_kv == "own" else attends
    if attends.any():
        tokens = torch.from_numpy(np.flatnonzero(present))
        with _silenced(mlp):
            attended = run(tokens)
        wanted = torch.from_numpy(attends[present])
        after[tokens[wanted]] = attended[wanted]
    if contract.target in ("attention", "attention+mlp"):
        after = hidden + _gate(contract, verdicts[0].score) * (after - hidden)
    thinks = everybody if contract.target == "attention" else verdicts[-1].runs
    score = verdicts[-1].score
    result = after.clone()
    chosen, others = (torch.from_numpy(np.flatnonzero(part)) for part in (thinks, ~thinks))
    if len(chosen):
        result[chosen] = after[chosen] + _mlp_gate(contract, score[chosen]) * mlp(norm(after[chosen]))
        if contract.target == "block":
            result[chosen] = _whole(contract, score[chosen], hidden[chosen], result[chosen])
    if adapter is not None and len(others):
        factor = 1 - torch.sigmoid(score[others, None]) if contract.gate == "split" else 1.0
        result[others] = after[others] + factor * adapted(adapter, norm(after[others]))
    return result


def _gate(contract: Mod, score: Any) -> Any:
    import torch

    r = score[:, None]
    return {"raw": r, "sigmoid": torch.sigmoid(r)}.get(contract.gate, torch.ones_like(r))


def _mlp_gate(contract: Mod, score: Any) -> Any:
    """Return the factor of the MLP's branch, [tokens, 1]."""
    import torch

    s = torch.sigmoid(score[:, None])
    if contract.gate == "split":
        return s
    if contract.gate == "affine":
        assert contract.affine is not None
        return contract.affine[0] + contract.affine[1] * s
    return _gate(contract, score) if contract.target in ("mlp", "attention+mlp") else torch.ones_like(s)


def _whole(contract: Mod, score: Any, before: Any, output: Any) -> Any:
    """Return a block's result from its input and output."""
    if contract.gate not in ("raw", "sigmoid"):
        return output
    gate = _gate(contract, score)
    return before + gate * (output - before) if contract.combine == "delta" else gate * output


@contextmanager
def _silenced(mlp: Any) -> Iterator[None]:
    """Let an MLP return zeros inside the context, so that its layer ends with attention."""
    mlp.forward = lambda x: x * 0
    try:
        yield
    finally:
        del mlp.forward


__all__ = ["RunTokens", "Verdict", "needs_parts", "run_parts"]
