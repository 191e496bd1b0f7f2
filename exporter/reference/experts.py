"""Mixtures of experts in transformers' models: how they run, and their parameters from tensors stored otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference.stored import Tensors

FloatArray = NDArray[np.float32]
# Ends of the names of stacked parameters -> names of each expert's tensors, one list for every layout of checkpoints.
_ONE_BY_ONE: dict[str, Sequence[Sequence[str]]] = {
    "mlp.experts.gate_up_proj": (
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
    ),
    "mlp.experts.down_proj": (("mlp.experts.{e}.down_proj.weight",), ("block_sparse_moe.experts.{e}.w2.weight",)),
}
_RENAMED = {
    "mlp.gate.weight": "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}


def read_of_experts(tensors: Tensors, name: str, experts: int) -> FloatArray | None:
    """Return a parameter of a mixture of experts, as transformers' conversion of checkpoints makes it.

    Args:
        tensors: the checkpoint's tensors.
        name: the parameter's name in transformers' model.
        experts: the number of experts, or 0 for a model without any.

    Returns:
        Its values; None for a parameter that the checkpoint does not store in another layout.
    """
    for end, stored in _RENAMED.items():
        renamed = name.removesuffix(end) + stored
        if name.endswith(end) and renamed in tensors.names:
            return tensors.read(renamed)
    for end, layouts in _ONE_BY_ONE.items():
        for parts in layouts if name.endswith(end) and experts else ():
            names = [[name.removesuffix(end) + part.format(e=e) for part in parts] for e in range(experts)]
            if all(single in tensors.names for each in names for single in each):
                return np.stack([np.concatenate([tensors.read(single) for single in each]) for each in names])
    return None


@contextmanager
def fixed_shapes(config: Any) -> Iterator[None]:
    """Run experts without shapes that depend on values, which the meta device lacks, inside the context."""
    usual, config._experts_implementation = config._experts_implementation, "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = usual


__all__ = ["fixed_shapes", "read_of_experts"]
