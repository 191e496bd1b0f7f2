"""The choices of a Radial Network's tokens in PyTorch: router scores, allowed choices and layer capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, as_numpy
from dynexport.exporter.reference.norms import norm_epsilon
from dynexport.exporter.reference.rows import GONE, IntArray, RowPaths
from dynexport.exporter.reference.stored import Tensors, read_router_tensor
from dynexport.exporter.reference.transformers_layers import DecoderLayers
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.radial.reference_entries import Entries
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.decisions import TURNED_AWAY

# A chunk that a single graph runs in one call: first token, end, and the number of tokens that a layer runs per hop.
Room = tuple[int, int, int]


@dataclass
class Row:
    """The state of one row during a pass.

    Attributes:
        number: the row's number in the pass.
        hidden: float32 [tokens, hidden].
        inside: bool [tokens], true until the token exits.
        visited: bool [tokens, layers], true for layers that the token ran.
        forced: int64 [max_steps, tokens], choices that replace the router's, or None.
        paths: the recorded paths.
        room: chunks in which layers run a limited number of tokens; empty for no limit.
        entries: KV entries by hop or by layer, depending on the cache policy.
    """

    number: int
    hidden: Any
    inside: BoolArray
    visited: BoolArray
    forced: IntArray | None
    paths: RowPaths
    room: Sequence[Room] = ()
    entries: dict[int, Entries] = field(default_factory=dict)


class Routers:
    """The router that all hops share, or one router per hop.

    Raises:
        DynexportError: for a tensor that is absent, of another shape or not finite.
    """

    def __init__(self, weights: Weights, contract: Radial, decoder: DecoderLayers) -> None:
        self._source, self._contract = weights.source, contract
        self._layers, self._hidden = len(decoder.modules), weights.model.config.hidden_size
        self._epsilon = router_epsilon(decoder)
        steps: Sequence[int | None] = [None] if contract.router.shared else range(contract.max_steps)
        self._routers = [self._read_router(weights.tensors, step) for step in steps]

    def choose(self, step: int, row: Row) -> None:
        """Choose for every token that is inside, and record it; a token that exits or has no choice is then outside."""
        asked = np.flatnonzero(row.inside)
        allowed = self._allowed(step, row.visited[asked])
        row.inside[asked] = allowed.any(axis=1)
        asked, allowed = asked[allowed.any(axis=1)], allowed[allowed.any(axis=1)]
        self._check_choices(step, row, asked, allowed)
        scores = self._scores(step, row, asked)
        among = np.where(allowed, scores, np.float32(-np.inf))
        second, best = np.partition(among, -2, axis=1)[:, -2:].T if among.shape[1] > 1 else (-np.inf, among[:, 0])
        choice = among.argmax(axis=1) if row.forced is None else row.forced[step, asked]
        paths, each = row.paths, np.arange(len(asked))
        paths.path[step, asked], paths.score[step, asked] = choice, scores[each, choice]
        paths.margin[step, asked] = best - second
        paths.probability[step, asked] = _softmax(among)[each, choice]
        row.inside[asked] = choice < self._layers
        self._turn_away(step, row)

    def _turn_away(self, step: int, row: Row) -> None:
        """Mark the tokens of a chunk that found their layer full: a layer runs the first that chose it."""
        for start, stop, places in row.room:
            path = row.paths.path[step, start:stop]
            for index in range(self._layers):
                path[np.flatnonzero(path == index)[places:]] = TURNED_AWAY

    def _allowed(self, step: int, visited: BoolArray) -> BoolArray:
        """Return the allowed choices, bool [tokens, choices]."""
        allowed = np.ones((len(visited), self._contract.choices(self._layers)), bool)
        if not self._contract.allow_reuse:
            allowed[:, : self._layers] = ~visited
        if self._contract.exit:
            allowed[:, self._layers] = step >= self._contract.min_steps
        return allowed

    def _scores(self, step: int, row: Row, asked: IntArray) -> FloatArray:
        """Return fc2(silu(fc1(rms_norm(h)))) of some tokens, float32 [tokens, choices]."""
        import torch

        router = self._routers[0 if self._contract.router.shared else step]
        h = row.hidden[asked]
        normed = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self._epsilon) * router["norm.weight"]
        inner = torch.nn.functional.silu(normed @ router["fc1.weight"].T + router["fc1.bias"])
        scores = inner @ router["fc2.weight"].T + router["fc2.bias"]
        if not scores.isfinite().all():
            token = asked[~scores.isfinite().all(dim=1).numpy()][0]
            raise DynexportError(
                f"{self._source}: step {step}: row {row.number}, token {token}: expected finite router scores, found "
                "NaN or infinity: the hidden states before this step are not finite, see the steps before it"
            )
        return as_numpy(scores)

    def _check_choices(self, step: int, row: Row, asked: IntArray, allowed: BoolArray) -> None:
        """Raise DynexportError for a forced choice that is not allowed."""
        if row.forced is None:
            return
        choices = {int(token): np.flatnonzero(may).tolist() for token, may in zip(asked, allowed, strict=True)}
        for token, found in enumerate(row.forced[step]):
            expected = choices.get(token, [GONE])
            if found not in expected:
                raise DynexportError(
                    f"forced path of row {row.number}, step {step}, token {token}: expected one of {expected}, "
                    f"found {found}"
                )

    def _read_router(self, tensors: Tensors, step: int | None) -> dict[str, Any]:
        """Return the float32 tensors of a hop's router, or of the shared one, by their names in the module."""
        import torch

        prefix = "model.radial_router." if step is None else f"model.radial_router.{step}."
        contract, hidden = self._contract, self._hidden
        width, choices = contract.router.hidden, contract.choices(self._layers)
        bias = prefix + "fc2.bias"
        if bias in tensors.names and tensors.shape(bias) != (choices,):
            raise DynexportError(
                f"{self._source}: tensor {bias}: expected {choices} scores, for {self._layers} layers and "
                f'{"exit" if contract.exit else "no exit"}, found shape {tensors.shape(bias)}: see "exit" in '
                "config.json"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "norm.weight": (hidden,),
            "fc1.weight": (width, hidden),
            "fc1.bias": (width,),
            "fc2.weight": (choices, width),
            "fc2.bias": (choices,),
        }
        return {
            name: torch.from_numpy(read_router_tensor(tensors, prefix + name, shape)) for name, shape in shapes.items()
        }


def router_epsilon(decoder: DecoderLayers) -> float:
    """Return the epsilon of the router's norm, which is that of the pool layers' input norm.

    Raises:
        DynexportError: when the layers have no input norm.
    """
    if decoder.input_norm is None:
        raise DynexportError(
            f"radial: expected layers with an input norm, found a {type(decoder.modules[0]).__name__}, which has none"
        )
    return norm_epsilon(decoder.modules[0].get_submodule(decoder.input_norm))


def _softmax(scores: FloatArray) -> FloatArray:
    import torch

    return as_numpy(torch.softmax(torch.from_numpy(scores), dim=-1))


__all__ = ["Room", "Routers", "Row", "router_epsilon"]
