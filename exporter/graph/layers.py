"""The modules that own weights; each declares the names and storage formats of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.families.architecture import Activation, NormKind
from dynexport.exporter.lowering.storage import Plain, Storage, StoredWeight
from dynexport.exporter.lowering.target import Target

PLAIN = Plain()


class Weighted(nn.Module):
    """A module with weights; ``stored`` maps the last part of a weight's name to the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, StoredWeight] = {}

    def store(self, name: str, shape: Sequence[int], storage: Storage = PLAIN) -> None:
        """Declare a weight; its parameters become attributes ``name + suffix``."""
        parts = storage.parameters(shape)
        self.stored[name] = StoredWeight(tuple(shape), storage, parts)
        for suffix, parameter in parts.items():
            setattr(self, name + suffix, parameter)


def stored_weights(module: nn.Module) -> Iterator[tuple[str, StoredWeight]]:
    """Yield every weight with its full name, in the order of the graph."""
    for name, child in module.named_modules():
        if isinstance(child, Weighted):
            for tensor, weight in child.stored.items():
                yield f"{name}.{tensor}".removesuffix("."), weight


def settle_storages(module: nn.Module, target: Target) -> None:
    """Let the target choose each weight's storage again, by its full name, before any operator uses the weight."""
    for name, child in module.named_modules():
        if isinstance(child, Weighted):
            for tensor, weight in list(child.stored.items()):
                storage = target.named_storage(f"{name}.{tensor}", weight)
                if storage is not weight.storage:
                    child.store(tensor, weight.shape, storage)


class Linear(Weighted):
    """y = x W^T + b with W [out_features, in_features], as in PyTorch."""

    def __init__(
        self, target: Target, in_features: int, out_features: int, *, bias: bool, storage: Storage | None = None
    ) -> None:
        super().__init__()
        self.target = target
        shape = (out_features, in_features)
        self.store("weight", shape, storage or target.weight_storage(shape))
        self.has_bias = bias
        if bias:
            self.store("bias", [out_features], storage or target.vector_storage)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return y [..., out_features] of x [..., in_features]."""
        y = self.target.matmul(op, x, self.stored["weight"])
        return op.Add(y, self.target.vector(op, self.bias)) if self.has_bias else y


class Vector(Weighted):
    """Numbers of a layer that are stored in float32 under the module's own name."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.store("", [count])

    @property
    def values(self) -> ir.Value:
        """The numbers, float32 [count]."""
        return self.stored[""].parts[""]


class Embedding(Weighted):
    """An embedding table [count, features]; a tied head multiplies by the same table."""

    def __init__(self, target: Target, count: int, features: int, *, tied: bool) -> None:
        super().__init__()
        self.target = target
        shape = (count, features)
        self.store("weight", shape, target.embedding_storage(shape, tied=tied))

    def forward(self, op: Any, indices: ir.Value) -> ir.Value:
        """Return the rows [..., features] of indices int64 [...]."""
        return self.target.gather_rows(op, indices, self.stored["weight"])

    def attend(self, op: Any, x: ir.Value) -> ir.Value:
        """Return x W^T [..., count] of x [..., features]: the head of a model with tied embeddings."""
        return self.target.matmul(op, x, self.stored["weight"])


class Norm(Weighted):
    """RMSNorm or LayerNorm over the last axis."""

    def __init__(self, target: Target, kind: NormKind, features: int, epsilon: float) -> None:
        super().__init__()
        self.target, self.kind, self.epsilon = target, kind, epsilon
        self.store("weight", [features], target.norm_storage)
        if kind == "layer":
            self.store("bias", [features], target.norm_storage)

    @property
    def shift(self) -> ir.Value | None:
        """LayerNorm's bias; None for RMSNorm."""
        return self.bias if self.kind == "layer" else None

    def forward(self, op: Any, x: ir.Value, residual: ir.Value | None = None) -> Any:
        """Return norm(x), or with ``residual`` (norm(residual + x), residual + x), fused if the target can."""
        if residual is None:
            return self.target.norm(op, x, self.weight, self.shift, self.epsilon)
        return self.target.add_norm(op, x, residual, self.weight, self.shift, self.epsilon)


class Mlp(nn.Module):
    """An MLP: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(
        self,
        target: Target,
        hidden: int,
        intermediate: int,
        activation: Activation,
        *,
        gated: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.target, self.activation, self.gated = target, activation, gated
        if gated:
            self.gate_proj = Linear(target, hidden, intermediate, bias=bias)
        self.up_proj = Linear(target, hidden, intermediate, bias=bias)
        self.down_proj = Linear(target, intermediate, hidden, bias=bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return the MLP's output [B, S, hidden] of x [B, S, hidden]."""
        up = self.up_proj(op, x)
        if self.gated:
            inner = op.Mul(self.target.activate(op, self.gate_proj(op, x), self.activation), up)
        else:
            inner = self.target.activate(op, up, self.activation)
        return self.down_proj(op, inner)
