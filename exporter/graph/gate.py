"""What a gate makes of a layer: h + g (y - h) for its input h and output y."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.exporter.lowering.target import cast


def gated(op: Any, hidden_states: ir.Value, output: ir.Value, gate: ir.Value) -> ir.Value:
    """A layer's input and output [.., hidden], added up in float32 by a gate float32 [.., 1]."""
    before, after = (cast(op, x, ir.DataType.FLOAT) for x in (hidden_states, output))
    return cast(op, op.Add(before, op.Mul(gate, op.Sub(after, before))), output.dtype)


__all__ = ["gated"]
