"""The output of a gated layer: h + g (y - h), with input h, output y and gate g."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.exporter.lowering.target import cast


def gated(op: Any, hidden_states: ir.Value, output: ir.Value, gate: ir.Value) -> ir.Value:
    """Return h + g (y - h), computed in float32, for h and y [.., hidden] and a gate g float32 [.., 1]."""
    before, after = (cast(op, x, ir.DataType.FLOAT) for x in (hidden_states, output))
    return cast(op, op.Add(before, op.Mul(gate, op.Sub(after, before))), output.dtype)


__all__ = ["gated"]
