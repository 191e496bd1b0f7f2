"""An independent implementation of looped models for the reference: every loop anew over all tokens, without caches.

Where an exited token's later entries are copies of its last ones, a layer gets the input that the token had there last:
keys and values made of it are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynexport.exporter.families.huginn_raven import ADAPTER
from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, Reference
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.rows import RowRoutes
from dynexport.exporter.reference.stored import Tensors, read_router_tensor
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.contract import Loop
from dynexport.runtime.bundle.errors import DynexportError

# Names of the final norm in transformers' families.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_GATE = "model.early_exit_gate"


@dataclass
class _Exits:
    """Which tokens go on to later loops, sums of probabilities and margins, each [loops - 1, rows, longest]."""

    chosen: BoolArray
    total: FloatArray
    margin: FloatArray


class LoopReference(Reference):
    """A model that runs its body several times (docs/routing-contract.md, loop).

    ``runs`` of ``logits`` and ``layer_outputs`` have a row for every run of a layer, as have the results.
    """

    def __init__(self, weights: Weights, contract: Loop) -> None:
        super().__init__(weights, weights.source)
        self._contract, self._stack = contract, self.layers
        self._first, self._last = contract.body or (0, self._stack - 1)
        self.layers += (contract.loops - 1) * (self._last + 1 - self._first)
        self._run = 0
        self._leaves = contract.exit.rule != "none"
        self._norm = _final_norm(self._model, weights.source)
        self._adapter = _read_adapter(weights) if contract.inject == "adapter" else None
        if contract.exit.rule == "hazard":
            self._gate = _read_gate(weights.tensors, self._model.config.hidden_size)
        self._forced: Sequence[np.ndarray] | None = None
        self._exits: _Exits | None = None

    def routed_logits(
        self, tokens: Sequence[Sequence[int]], forced: Sequence[np.ndarray] | None, *, at: Sequence[int] = ()
    ) -> tuple[list[FloatArray], list[RowRoutes]]:
        """Return teacher-forced logits, as ``logits``, and which tokens went on to which loop.

        Args:
            tokens: rows of token ids.
            forced: per row bool [loops - 1, tokens], decisions that replace the gate's; None: the gate decides.
            at: as for ``logits``.
        """
        self._forced = forced
        found = self.logits(tokens, at=at)
        return found, self._routes(tokens)

    def routed_layer_outputs(
        self, tokens: Sequence[Sequence[int]], forced: Sequence[np.ndarray] | None
    ) -> list[FloatArray]:
        """Return hidden states after every run, as ``layer_outputs``; arguments are those of ``routed_logits``."""
        self._forced = forced
        return self.layer_outputs(tokens)

    def _routes(self, tokens: Sequence[Sequence[int]]) -> list[RowRoutes]:
        exits = self._exits
        assert exits is not None
        return [
            RowRoutes(
                exits.chosen[:, row, : len(ids)].copy(),  # safetensors stores the memory of a view as it is
                exits.total[:, row, : len(ids)].copy(),
                exits.margin[:, row, : len(ids)].copy(),
                np.zeros(len(exits.chosen), np.int64),
            )
            for row, ids in enumerate(tokens)
        ]

    @contextmanager
    def _routed(self, runs: BoolArray, outputs: list[Any] | None) -> Iterator[None]:
        calls: list[Call] = []

        def forward(index: int, call: Call) -> Any:
            """Leave the hidden states as they are until the last layer is called; then run all loops."""
            calls.append(call)
            if index < self._stack - 1:
                return self._decoder.hidden(call)
            return self._run_loops(calls, runs, [] if outputs is None else outputs)

        with self._decoder.replaced(forward):
            yield

    def _place(self, index: int) -> int:
        return self._run

    def _run_loops(self, calls: Sequence[Call], runs: BoolArray, outputs: list[Any]) -> Any:
        """Return the hidden states after the last run; ``calls`` has the arguments of every layer."""
        import torch

        def run(layer: int, hidden: Any) -> Any:
            self._run = len(outputs)
            after = self._run_layer(layer, runs[:, self._run], self._decoder.with_hidden(calls[layer], hidden))
            outputs.append(after)
            return after

        hidden = self._decoder.hidden(calls[0])
        for layer in range(self._first):
            hidden = run(layer, hidden)
        inputs: dict[int, Any] = {}
        injected, hidden = hidden, hidden if self._adapter is None else self._start(hidden)
        live, kept = torch.from_numpy(runs[:, 0]), hidden
        exits = self._no_exits(runs)
        for loop in range(self._contract.loops):
            there = torch.from_numpy(runs[:, len(outputs)])[..., None]
            hidden = torch.where(there, self._entering(loop, hidden, injected), hidden)
            for layer in range(self._first, self._last + 1):
                if loop and self._contract.exited_kv == "last":
                    hidden = torch.where(live[..., None], hidden, inputs[layer])
                inputs[layer] = hidden
                hidden = run(layer, hidden)
            before, kept = kept, torch.where(live[..., None], hidden, kept) if self._leaves else hidden
            if self._leaves and loop < self._contract.loops - 1:
                live = self._decide(loop, before, kept, live, exits)
        hidden = self._norm(kept) if self._contract.norm_after else kept
        for layer in range(self._last + 1, self._stack):
            hidden = run(layer, hidden)
        self._exits = exits
        return hidden

    def _no_exits(self, runs: BoolArray) -> _Exits:
        shape = (self._contract.loops - 1, runs.shape[0], runs.shape[2])
        zeros = np.zeros(shape, np.float32)
        return _Exits(np.zeros(shape, bool), zeros, zeros.copy())

    def _start(self, hidden: Any) -> Any:
        """Return the state of every token before the first loop, shaped as ``hidden``."""
        import torch

        return torch.from_numpy(self._contract.start_state(hidden.shape[-1])).expand_as(hidden)

    def _entering(self, loop: int, hidden: Any, injected: Any) -> Any:
        """Return what a loop begins with, from the state and the body's input."""
        import torch

        if loop and self._contract.norm_between:
            hidden = self._norm(hidden)
        return hidden if self._adapter is None else torch.cat([hidden, injected], dim=-1) @ self._adapter.T

    def _decide(self, loop: int, before: Any, hidden: Any, live: Any, exits: _Exits) -> Any:
        """Return which of the tokens that ran a loop go on to the next one, bool [rows, longest].

        ``before`` and ``hidden`` are the tokens' states before and after the loop.
        """
        import torch

        threshold, there = np.float32(self._contract.exit.threshold), live.numpy()
        if self._contract.exit.rule == "change":
            change = ((hidden - before).norm(dim=-1) / hidden.norm(dim=-1)).numpy()
            exits.total[loop] = np.where(there, change, exits.total[loop - 1])
            goes_on = exits.total[loop] >= threshold
        else:
            exits.total[loop] = self._hazard(loop, hidden, there, exits)
            goes_on = exits.total[loop] < threshold
        for row, told in enumerate(self._forced or ()):
            goes_on[row, : told.shape[1]] = told[loop]
        exits.chosen[loop] = goes_on & there
        exits.margin[loop] = np.abs(exits.total[loop] - threshold)
        return torch.from_numpy(exits.chosen[loop].copy())

    def _hazard(self, loop: int, hidden: Any, there: BoolArray, exits: _Exits) -> FloatArray:
        """Return the sum of the gate's probabilities, [rows, longest]; that of tokens that are not there stays."""
        import torch

        weight, bias = self._gate
        share: FloatArray = torch.sigmoid(self._norm(hidden) @ torch.from_numpy(weight[0]) + float(bias[0])).numpy()
        if loop == 0:
            self._passed = 1 - share
            return share
        before, passed = exits.total[loop - 1], self._passed
        self._passed = passed * (1 - share)
        return np.where(there, before + share * passed, before)


def _read_adapter(weights: Weights) -> Any:
    """Return the adapter's matrix [hidden, 2 hidden] with the values of the bundle, which has its halves apart."""
    import torch

    halves = np.split(weights.tensors.read(ADAPTER), 2, axis=1)
    return torch.cat([weights.as_stored(ADAPTER, np.ascontiguousarray(half)) for half in halves], dim=1)


def _read_gate(tensors: Tensors, hidden: int) -> tuple[FloatArray, FloatArray]:
    """Return weight [1, hidden] and bias [1] of the gate."""
    weight = read_router_tensor(tensors, f"{_GATE}.weight", (1, hidden))
    bias = np.zeros(1, np.float32)
    if f"{_GATE}.bias" in tensors.names:
        bias = read_router_tensor(tensors, f"{_GATE}.bias", (1,))
    return weight, bias


def _final_norm(model: Any, source: str) -> Any:
    """Return the norm after the last layer. Raises DynexportError for a model with none of the known names."""
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _FINAL_NORMS and not any(part.isdigit() for part in name.split("."))
    ]
    if len(found) != 1:
        raise DynexportError(
            f"{source}: the PyTorch reference: expected a norm after the last layer, found {len(found)} by the names "
            f"{', '.join(_FINAL_NORMS)}"
        )
    return found[0]


__all__ = ["LoopReference"]
