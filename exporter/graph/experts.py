"""A mixture of experts in place of an MLP: a router scores all experts, and the best of a token run for it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.families.architecture import Architecture, Experts
from dynexport.exporter.graph.layers import PLAIN, Linear, Mlp, Weighted
from dynexport.exporter.lowering.experts import ExpertWeights
from dynexport.exporter.lowering.storage import Stacked, Storage
from dynexport.exporter.lowering.target import Target, cast

# Replaces an expert's number in the names of weights that are stacked over all experts.
_ALL = "pool"


class ExpertLinear(Weighted):
    """The same product of all experts: weights [experts, out_features, in_features], and biases."""

    def __init__(self, target: Target, experts: Experts, storage: Storage, in_features: int, out_features: int) -> None:
        super().__init__()
        self.store("weight", (out_features, in_features), Stacked(storage, experts.count))
        if experts.bias:
            self.store("bias", [out_features], Stacked(target.vector_storage, experts.count))


class MixtureOfExperts(nn.Module):
    """The router, the experts and the expert of all tokens; its router multiplies in float32."""

    def __init__(self, target: Target, architecture: Architecture, experts: Experts) -> None:
        super().__init__()
        self.target, self.chosen = target, experts
        hidden, channels = architecture.hidden_size, experts.intermediate_size
        self.router = Linear(target, hidden, experts.count, bias=experts.bias, storage=PLAIN)
        self.experts, pool = nn.Module(), nn.Module()
        storage = target.expert_storage((hidden, channels))
        pool.gate_up_proj = ExpertLinear(target, experts, storage, hidden, 2 * channels)
        pool.down_proj = ExpertLinear(target, experts, storage, channels, hidden)
        setattr(self.experts, _ALL, pool)
        if experts.shared_size is not None:
            self.shared_expert = Mlp(target, hidden, experts.shared_size, "silu", gated=True, bias=False)
            self.shared_expert_gate = Linear(target, hidden, 1, bias=False, storage=PLAIN)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return the sum of the outputs of a token's experts, shaped like x [.., hidden]."""
        pool = getattr(self.experts, _ALL)
        gate_up, down = pool.gate_up_proj, pool.down_proj
        weights = ExpertWeights(
            gate_up=gate_up.stored["weight"],
            down=down.stored["weight"],
            gate_up_bias=gate_up.bias if self.chosen.bias else None,
            down_bias=down.bias if self.chosen.bias else None,
        )
        y = self.target.experts(op, x, self.router(op, cast(op, x, ir.DataType.FLOAT)), weights, self.chosen)
        if self.chosen.shared_size is None:
            return y
        gate = op.Sigmoid(self.shared_expert_gate(op, cast(op, x, ir.DataType.FLOAT)))
        return op.Add(y, op.Mul(self.shared_expert(op, x), cast(op, gate, y.dtype)))


__all__ = ["MixtureOfExperts"]
