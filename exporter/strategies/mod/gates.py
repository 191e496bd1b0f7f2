"""Write the factors of routed layers' results: functions of the router's score."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.runtime.bundle.contract import Mod


def strength_of(op: Any, contract: Mod, score: ir.Value, probability: ir.Value | None) -> ir.Value:
    """Return what gates are functions of, float32 [B, S, 1]: sigmoid(r), or r itself where the gate is raw.

    Args:
        op: writes operators into the graph.
        contract: the strategy's contract.
        score: the router's r, float32 [B, S, 1].
        probability: Sigmoid(r) where the graph has it already; else None.
    """
    if contract.gate in ("raw", "none"):
        return score
    if contract.combine == "replace":
        # The gate is the scale of all hidden states, which a norm takes away again: its relative error stays. That of
        # ONNX Runtime's Sigmoid is up to 1e-2 below -8, and 1 below -16; this one's is 1e-7.
        exact: ir.Value = op.Div(1.0, op.Add(op.Exp(op.Sub(0.0, score)), 1.0))
        return exact
    found: ir.Value = op.Sigmoid(score) if probability is None else probability
    return found


def mlp_gate(op: Any, contract: Mod, strength: ir.Value) -> ir.Value | None:
    """Return the factor of the MLP's branch for strengths [.., 1], where it has one of its own; else None."""
    if contract.gate == "affine":
        assert contract.affine is not None
        offset, slope = contract.affine
        factor: ir.Value = op.Add(op.Mul(strength, slope), offset)
        return factor
    return strength if contract.gate == "split" else None


__all__ = ["mlp_gate", "strength_of"]
