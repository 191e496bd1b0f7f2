"""Mixtures of experts: the fields that several families share, and where the experts' tensors come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dynexport.exporter.families.architecture import Architecture, Array, Experts, Source
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import Sources

# Bounds the number of tensors that a hostile config asks for.
_MOST_EXPERTS = 1 << 16
# The sources of an expert's two products from its layer and its number.
OfExpert = Callable[[int, int], dict[str, Source]]


def read_experts(fields: Fields, *, size: str, count: str, layers: tuple[bool, ...], normalised: bool) -> Experts:
    """Return a mixture of experts from the fields that most families have.

    Args:
        fields: the fields of config.json.
        size: the field of an expert's channels.
        count: the field of the number of experts.
        layers: whether each layer has experts.
        normalised: whether the weights of the chosen experts are divided by their sum.

    Raises:
        DynexportError: when a field is missing or its value is not supported.
    """
    experts = fields.integer(count, at_most=_MOST_EXPERTS // len(layers))
    fields.only("hidden_act", "silu")
    return Experts(
        count=experts,
        chosen=fields.integer("num_experts_per_tok", at_most=experts),
        intermediate_size=fields.integer(size),
        normalised=normalised,
        layers=layers,
    )


def every_layer(fields: Fields) -> tuple[bool, ...]:
    """Return that all layers have experts."""
    return (True,) * fields.layers("num_hidden_layers")


def sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Return which layers have experts by ``decoder_sparse_step`` and ``mlp_only_layers``, as in Qwen's families."""
    layers, step = fields.layers("num_hidden_layers"), fields.integer("decoder_sparse_step")
    plain = fields.get("mlp_only_layers", [])
    known = isinstance(plain, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in plain)
    if not known:
        raise fields.error("mlp_only_layers", plain, "a list of layers")
    return tuple(i not in plain and (i + 1) % step == 0 for i in range(layers))


def with_experts(
    architecture: Architecture, experts: Experts, of_expert: OfExpert, router: str = "mlp.gate"
) -> Architecture:
    """Return the architecture with a mixture of experts, and with the sources of its tensors.

    Args:
        architecture: the architecture of the rest of the model.
        experts: the mixture.
        of_expert: the sources of an expert's products, by the ends of the graph's names.
        router: the checkpoint's name of the router within a layer.
    """
    sources: Sources = {}
    for layer in (i for i, mixed in enumerate(experts.layers) if mixed):
        ours, theirs = f"model.layers.{layer}.mlp.router", f"model.layers.{layer}.{router}"
        sources |= {f"{ours}.{kind}": Source((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}
        for expert in range(experts.count):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            sources |= {prefix + name: source for name, source in of_expert(layer, expert).items()}
    return replace(architecture, experts=experts, sources={**architecture.sources, **sources})


def one_by_one(prefix: str, gate: str, up: str, down: str) -> OfExpert:
    """Return the sources of experts that are stored one by one.

    Args:
        prefix: the checkpoint's name prefix of an expert, with ``{i}`` for the layer and ``{e}`` for its number.
        gate: name of the gate's product behind it.
        up: name of the product that the gate multiplies.
        down: name of the last product.
    """

    def of_expert(layer: int, expert: int) -> dict[str, Source]:
        start = prefix.format(i=layer, e=expert)
        both = (f"{start}{gate}.weight", f"{start}{up}.weight")
        return {
            "gate_up_proj.weight": Source(both, _in_turn),
            "down_proj.weight": Source((f"{start}{down}.weight",)),
        }

    return of_expert


def halves(parts: list[Array]) -> Array:
    """Return the rows of gate and up in turn, from a matrix whose first half is the gate's."""
    (both,) = parts
    return _in_turn([both[: len(both) // 2], both[len(both) // 2 :]])


def turned(parts: list[Array]) -> Array:
    """Return a matrix that is stored transposed."""
    return np.ascontiguousarray(parts[0].T)


def _in_turn(parts: list[Array]) -> Array:
    """Return the rows of two matrices of one shape in turn: engines take the rows of gate and up as pairs."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


__all__ = ["every_layer", "halves", "one_by_one", "read_experts", "sparse_layers", "turned", "with_experts"]
