"""Where the graph's tensors come from: helpers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from dynexport.exporter.families.architecture import Array, Source

Combine = Callable[[list[Array]], Array]
Sources = dict[str, Source]


def stacked_qkv(
    layers: int, *, bias: bool, combine: Combine | None = None, prefix: str = "model.layers.{i}.self_attn."
) -> Sources:
    """Return the sources of ``qkv_proj`` in every layer: the separate q, k and v projections.

    Args:
        layers: the number of layers.
        bias: whether the projections have biases.
        combine: makes the stacked tensor from the three; None stacks them.
        prefix: the checkpoint's name prefix of the attention of a layer, with ``{i}`` for its number.
    """
    return {
        f"model.layers.{i}.self_attn.qkv_proj.{kind}": Source(
            tuple(f"{prefix.format(i=i)}{part}_proj.{kind}" for part in "qkv"), combine
        )
        for i in range(layers)
        for kind in (("weight", "bias") if bias else ("weight",))
    }


def renamed(layers: int, outer: dict[str, str], inner: dict[str, str], prefix: str = "model.layers.{i}.") -> Sources:
    """Return the sources of weights and biases for a family with other module names.

    Args:
        layers: the number of layers.
        outer: module of the graph -> module of the checkpoint, outside the layers.
        inner: module of the graph -> module of the checkpoint, within a layer.
        prefix: the checkpoint's name prefix of a layer, with ``{i}`` for its number.
    """
    modules = dict(outer)
    for i in range(layers):
        modules |= {f"model.layers.{i}.{ours}": prefix.format(i=i) + theirs for ours, theirs in inner.items()}
    return {
        f"{ours}.{kind}": Source((f"{theirs}.{kind}",))
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def combined(sources: Sources, module: str, combine: Combine) -> Sources:
    """Return the sources with ``combine``, which orders rows, applied to a module of every layer, such as qkv_proj."""
    return {
        name: replace(source, combine=combine, moves_rows=True) if f".{module}." in name else source
        for name, source in sources.items()
    }


def norms(layers: int, *inner: str) -> list[str]:
    """Return the names of the final norm and of these norms of every layer, without ``.weight``."""
    return ["model.norm", *(f"model.layers.{i}.{norm}" for i in range(layers) for norm in inner)]


def same_names(modules: Iterable[str]) -> Sources:
    """Return the sources of the weights of modules that have the graph's names in the checkpoint."""
    return {f"{name}.weight": Source((f"{name}.weight",)) for name in modules}


def one_plus(names: Iterable[str]) -> Sources:
    """Return the sources of norms that multiply by 1 + w, where w is stored."""
    return {f"{name}.weight": Source((f"{name}.weight",), lambda parts: parts[0] + 1) for name in names}


def without_bias(sources: Sources, *names: str) -> Sources:
    """Return the sources with zeros for the biases of norms that have none.

    Args:
        sources: the sources of a family with other module names, its norms included.
        names: the ends of the norms' names in the graph.
    """
    zeros = {
        f"{name.removesuffix('.weight')}.bias": Source(source.names, lambda parts: np.zeros_like(parts[0]))
        for name, source in sources.items()
        if name.endswith(tuple(f"{end}.weight" for end in names))
    }
    return sources | zeros


def plain_norms(names: Iterable[str], features: int) -> Sources:
    """Return the sources of LayerNorms that checkpoints have no tensors of: ones and zeros."""
    ones, zeros = (
        Source((), lambda _: np.ones(features, np.float32)),
        Source((), lambda _: np.zeros(features, np.float32)),
    )
    return {f"{name}.{kind}": source for name in names for kind, source in (("weight", ones), ("bias", zeros))}


def split_gate_up(layers: int, fused: str = "model.layers.{i}.mlp.gate_up_proj.weight") -> Sources:
    """Return the sources of ``gate_proj`` and ``up_proj``: the halves of the tensor ``fused`` of a layer ``{i}``."""

    def half(which: int) -> Combine:
        def combine(parts: list[Array]) -> Array:
            rows = parts[0].shape[0] // 2
            return parts[0][which * rows : (which + 1) * rows]

        return combine

    return {
        f"model.layers.{i}.mlp.{part}_proj.weight": Source((fused.format(i=i),), half(which), moves_rows=True)
        for i in range(layers)
        for which, part in enumerate(("gate", "up"))
    }


def grouped_qkv(groups: int, queries: int, head_dim: int) -> Combine:
    """Return a ``combine`` for fused rows [groups, queries + 2, head_dim]: each key head follows its query heads.

    Args:
        groups: the number of key and value heads.
        queries: query heads of a group.
        head_dim: channels of a head.
    """

    def combine(parts: list[Array]) -> Array:
        (fused,) = parts
        heads = fused.reshape(groups, queries + 2, head_dim, *fused.shape[1:])
        query, key, value = heads[:, :queries], heads[:, queries], heads[:, queries + 1]
        rows = [part.reshape(-1, *fused.shape[1:]) for part in (query, key, value)]
        return np.concatenate(rows)

    return combine


def turned_qkv(heads: int, kv_heads: int, head_dim: int, rotated: int) -> Combine:
    """Return a ``combine`` for q, k and v of a family that rotates channels 2 i and 2 i + 1 of a head together.

    The graph rotates channels i and i + rotated / 2 together, so queries and keys are reordered alike.

    Args:
        heads: the number of query heads.
        kv_heads: the number of key heads.
        head_dim: channels of a head.
        rotated: channels of a head that are rotated, the first ones.
    """
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]

    def combine(parts: list[Array]) -> Array:
        query, key, value = parts
        turned = [
            part.reshape(count, head_dim, *part.shape[1:])[:, order].reshape(part.shape)
            for part, count in ((query, heads), (key, kv_heads))
        ]
        return np.concatenate([*turned, value])

    return combine
