"""An independent implementation of looped models for the reference: every loop anew over all tokens, without caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dynexport.exporter.reference.hugging_face import BoolArray, Reference
from dynexport.exporter.reference.transformers_layers import Call
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.contract import Loop
from dynexport.runtime.bundle.errors import DynexportError

# Names of the final norm in transformers' families.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


class LoopReference(Reference):
    """A model that runs its body several times (docs/routing-contract.md, loop).

    ``runs`` of ``logits`` and ``layer_outputs`` have a row for every run of a layer, as have the results.
    """

    def __init__(self, weights: Weights, contract: Loop) -> None:
        super().__init__(weights, weights.source)
        stack = list(range(self.layers))
        first, last = contract.body or (0, self.layers - 1)
        self._order = stack[:first]
        self._restarts = []
        for _ in range(contract.loops):
            self._restarts.append(len(self._order))
            self._order += stack[first : last + 1]
        del self._restarts[0]
        self._order += stack[last + 1 :]
        self._run = 0
        self._stack, self.layers = len(stack), len(self._order)
        self._norm = _final_norm(self._model, weights.source) if contract.norm_between else None

    @contextmanager
    def _routed(self, runs: BoolArray, outputs: list[Any] | None) -> Iterator[None]:
        calls: list[Call] = []

        def forward(index: int, call: Call) -> Any:
            """Leave the hidden states as they are until the last layer is called; then run all loops."""
            calls.append(call)
            if index < self._stack - 1:
                return self._decoder.hidden(call)
            return self._run_loops(calls, runs, outputs)

        with self._decoder.replaced(forward):
            yield

    def _place(self, index: int) -> int:
        return self._run

    def _run_loops(self, calls: Sequence[Call], runs: BoolArray, outputs: list[Any] | None) -> Any:
        """Return the hidden states after the last run; ``calls`` has the arguments of every layer."""
        import torch

        hidden = self._decoder.hidden(calls[0])
        for number, layer in enumerate(self._order):
            self._run = number
            there = runs[:, number]
            if self._norm is not None and number in self._restarts:
                hidden = torch.where(torch.from_numpy(there)[..., None], self._norm(hidden), hidden)
            hidden = self._run_layer(layer, there, self._decoder.with_hidden(calls[layer], hidden))
            if outputs is not None:
                outputs.append(hidden)
        return hidden


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
