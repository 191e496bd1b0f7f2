"""The modules that routing adds to a layer: routers of every kind, the predictor, and the skip branch's adapter."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.layers import PLAIN, Linear, Mlp, Norm
from dynexport.exporter.lowering.target import Target
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.mod_fields import ModRouter

ROUTERS = ("mod_router", "mod_mlp_router")


class PairRouter(Linear):
    """A router with two scores, to run and to skip; r is their difference."""

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return r [B, S, 1] of x [B, S, hidden]."""
        run, skip = op.Split(super().forward(op, x), [1, 1], axis=-1, _outputs=2)
        score: ir.Value = op.Sub(run, skip)
        return score


class MlpRouter(nn.Module):
    """A router of two layers, ``fc2(activation(norm(fc1(x))))``, with or without the norm and the biases."""

    def __init__(
        self, target: Target, router: ModRouter, hidden: int, width: int, epsilon: float, *, present: frozenset[str]
    ) -> None:
        super().__init__()
        self._activation = "tanh" if router.kind == "bottleneck" else router.activation
        self._normed = "norm.weight" in present
        self.fc1 = Linear(target, hidden, width, bias="fc1.bias" in present, storage=PLAIN)
        if self._normed:
            self.norm = Norm(target, "rms", width, router.epsilon or epsilon)
        self.fc2 = Linear(target, width, 1, bias="fc2.bias" in present, storage=PLAIN)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return r [B, S, 1] of x [B, S, hidden]."""
        inner = self.fc1(op, x)
        if self._normed:
            inner = self.norm(op, inner)
        if self._activation == "silu":
            inner = op.Mul(inner, op.Sigmoid(inner))
        else:
            inner = op.Tanh(inner) if self._activation == "tanh" else op.Relu(inner)
        score: ir.Value = self.fc2(op, inner)
        return score


class Predictor(nn.Module):
    """fc2(silu(fc1(x))), the causal replacement of top-k (arXiv 2404.02258, section 3.5)."""

    def __init__(self, target: Target, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(target, hidden, width, bias=True, storage=PLAIN)
        self.fc2 = Linear(target, width, 1, bias=True, storage=PLAIN)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return logits [B, S, 1] of x [B, S, hidden]."""
        inner = self.fc1(op, x)
        logit: ir.Value = self.fc2(op, op.Mul(inner, op.Sigmoid(inner)))
        return logit


def attach_routers(layer: DecoderLayer, contract: Mod, checkpoint: Checkpoint, target: Target) -> None:
    """Add a routed layer's routers, predictor and adapter; its sizes are those of the checkpoint's tensors."""
    hidden, prefix = layer.architecture.hidden_size, f"model.layers.{layer.index}."
    for name in ROUTERS[: contract.decisions_per_layer]:
        setattr(layer, name, _router(layer.architecture, contract, checkpoint, target, f"{prefix}{name}."))
    if contract.decision.rule == "predictor":
        width = _width(checkpoint, f"{prefix}mod_predictor.fc1.weight")
        layer.mod_predictor = Predictor(target, hidden, width)
    if contract.skip_branch == "adapter":
        width = _width(checkpoint, f"{prefix}mod_adapter.gate_proj.weight")
        layer.mod_adapter = Mlp(target, hidden, width, "silu", gated=True, bias=False)


def _router(
    architecture: Architecture, contract: Mod, checkpoint: Checkpoint, target: Target, prefix: str
) -> nn.Module:
    hidden, kind = architecture.hidden_size, contract.router.kind
    if kind in ("linear", "pair"):
        bias = prefix + "bias" in checkpoint.names
        made = PairRouter if kind == "pair" else Linear
        return made(target, hidden, 2 if kind == "pair" else 1, bias=bias, storage=PLAIN)
    found = {"norm.weight"} if kind == "bottleneck" else set()
    found |= {name for name in ("fc1.bias", "norm.weight", "fc2.bias") if prefix + name in checkpoint.names}
    width = _width(checkpoint, prefix + "fc1.weight")
    epsilon = architecture.norm_epsilon
    return MlpRouter(target, contract.router, hidden, width, epsilon, present=frozenset(found))


def _width(checkpoint: Checkpoint, name: str) -> int:
    """Return the first size of a matrix; a wrong shape raises later, when the tensor is read."""
    return (*checkpoint.shape(name), 1)[0]


__all__ = ["ROUTERS", "attach_routers"]
