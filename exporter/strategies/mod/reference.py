"""An independent implementation of Mixture-of-Depths for the reference: row by row, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, Reference, Runs
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.rows import RowRoutes
from dynexport.exporter.reference.transformers_layers import DecoderLayers
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.mod.reference_parts import Verdict, needs_parts, run_parts
from dynexport.exporter.strategies.mod.reference_routers import Parts, read_adapter, read_router, score_of
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError

Spans = Sequence[tuple[int, int]]
"""(start, stop) of a row's prompts: the first starts at 0, later turns of a conversation follow."""


@dataclass
class _Pass:
    """The inputs and the recorded routes of one forward pass."""

    prompted: Sequence[Spans]
    forced: Sequence[BoolArray] | None
    routes: list[RowRoutes]


class ModReference(Reference):
    """A model whose routed layers run the tokens that their routers choose (docs/routing-contract.md, mod).

    ``logits`` and ``layer_outputs`` decide every token causally, like generated tokens.
    """

    def __init__(self, weights: Weights, contract: Mod, max_length: int) -> None:
        super().__init__(weights, weights.source)
        self._contract = contract
        self._slots = contract.slots(max_length)
        self._read_routers()
        self._pass: _Pass | None = None

    @classmethod
    def from_checkpoint(  # type: ignore[override]
        cls, checkpoint: Checkpoint, *, streaming: bool = False, contract: Mod, max_length: int
    ) -> ModReference:
        """Build the model of ``checkpoint.config`` and load its weights and routers.

        Args:
            checkpoint: tensors with Hugging Face names and layouts, routers under the contract's names.
            streaming: as for ``Reference.from_checkpoint``; routers are small and always stay in memory.
            contract: the contract of the routers.
            max_length: a row's capacity in tokens; a routed layer's cache holds a share of it.

        Raises:
            DynexportError: as ``Reference.from_checkpoint``; for a routed layer that the model does not have; for a
                router or predictor tensor that is absent, of another shape or not finite.
        """
        return cls(Weights(checkpoint, streaming=streaming), contract, max_length)

    def routed_logits(
        self,
        tokens: Sequence[Sequence[int]],
        prompted: Sequence[Spans],
        forced: Sequence[BoolArray] | None = None,
        *,
        at: Sequence[int] = (),
    ) -> tuple[list[FloatArray], list[RowRoutes]]:
        """Return teacher-forced logits and routes.

        Args:
            tokens: rows of token ids; lengths may differ, unless ``at`` is given.
            prompted: the prompts' spans of each row. With ``prefill: topk`` top-k runs within each span; all other
                tokens are decided causally.
            forced: bool [decisions, tokens] per row, decisions that replace the routers'. Tokens that find a cache
                full are skipped all the same.
            at: positions to compute logits for; empty computes all.

        Returns:
            Logits, float32 [length or positions, vocabulary] per row, and the routes of each row.

        Raises:
            DynexportError: as ``Reference.logits``; for spans outside their row or out of order, forced decisions of
                another shape, or a NaN score.
        """
        with self._routing(tokens, prompted, forced) as routes:
            return self.logits(tokens, at=at), routes

    def routed_layer_outputs(
        self, tokens: Sequence[Sequence[int]], prompted: Sequence[Spans], forced: Sequence[BoolArray] | None = None
    ) -> tuple[list[FloatArray], list[RowRoutes]]:
        """Return hidden states after every layer, float32 [layers, length, hidden] per row, and the routes.

        Arguments and errors are as for ``routed_logits``.
        """
        with self._routing(tokens, prompted, forced) as routes:
            return self.layer_outputs(tokens), routes

    @contextmanager
    def _routing(
        self, tokens: Sequence[Sequence[int]], prompted: Sequence[Spans], forced: Sequence[BoolArray] | None
    ) -> Iterator[list[RowRoutes]]:
        """Make forward passes over ``tokens`` use these spans and decisions, and record their routes."""
        self._check_tokens(tokens)
        self._check_rows(tokens, prompted, forced)
        layers = len(self._contract.routed_layers) * self._parts
        routes = [
            RowRoutes(
                np.zeros((layers, len(ids)), bool),
                np.zeros((layers, len(ids)), np.float32),
                np.zeros((layers, len(ids)), np.float32),
                np.zeros(layers, np.int64),
            )
            for ids in tokens
        ]
        self._pass = _Pass(prompted, forced, routes)
        try:
            yield routes
        finally:
            self._pass = None

    def _check_rows(
        self, tokens: Sequence[Sequence[int]], prompted: Sequence[Spans], forced: Sequence[BoolArray] | None
    ) -> None:
        for name, rows in (("prompted", prompted), ("forced", forced)):
            if rows is not None and len(rows) != len(tokens):
                raise DynexportError(f"{name}: expected an entry for each of {len(tokens)} rows, found {len(rows)}")
        for row, ids in enumerate(tokens):
            bounds = [bound for span in prompted[row] for bound in span]
            if sorted(bounds) != bounds or not all(0 <= bound <= len(ids) for bound in bounds):
                raise DynexportError(
                    f"prompted spans of row {row}: expected ascending ones within 0..{len(ids)}, "
                    f"found {list(prompted[row])}"
                )
            if forced is None:
                continue
            expected = (len(self._contract.routed_layers) * self._parts, len(ids))
            if forced[row].shape != expected or forced[row].dtype != np.bool_:
                raise DynexportError(
                    f"forced routes of row {row}: expected bool {list(expected)}, "
                    f"found {forced[row].dtype} {list(forced[row].shape)}"
                )

    def _forward(
        self,
        tokens: Sequence[Sequence[int]],
        runs: Runs | None,
        outputs: list[Any] | None = None,
        *,
        at: Sequence[int] = (),
    ) -> Any:
        if runs is not None:
            raise DynexportError("runs: expected none, as the routers decide: give forced routes to routed_logits")
        if self._pass is not None:
            return super()._forward(tokens, runs, outputs, at=at)
        with self._routing(tokens, [()] * len(tokens), None):
            return super()._forward(tokens, runs, outputs, at=at)

    def _run_layer(self, index: int, runs: BoolArray, call: Call) -> Any:
        if index not in self._contract.routed_layers:
            return super()._run_layer(index, runs, call)
        before = self._decoder.hidden(call)
        after = before.clone()
        with self._weights.layer(index) as layer:
            for row, real in enumerate(runs):
                hidden = before[row, : int(real.sum())]
                verdicts = [self._verdict(index, part, row, layer, hidden) for part in range(self._parts)]
                after[row, : len(hidden)] = self._run_row(index, layer, call, row, len(runs), hidden, verdicts)
        return after

    def _run_row(
        self, index: int, layer: Any, call: Call, row: int, rows: int, hidden: Any, verdicts: list[Verdict]
    ) -> Any:
        """Return the hidden states of a row after a routed layer, [tokens, hidden]."""
        import torch

        def run(tokens: Any) -> Any:
            picked = pick_chosen(self._contract, self._decoder, call, row, rows, tokens)
            return self._weights.run(layer, picked, row, tokens)[0]

        if needs_parts(self._contract):
            return run_parts(self._contract, layer, run, hidden, verdicts, self._adapters.get(index))
        after = hidden.clone()
        chosen = torch.from_numpy(np.flatnonzero(verdicts[0].runs))
        if len(chosen):
            after[chosen] = self._combine(verdicts[0].score[chosen], hidden[chosen], run(chosen))
        return after

    def _verdict(self, index: int, part: int, row: int, layer: Any, hidden: Any) -> Verdict:
        import torch

        score, logit = self._score(index, part, row, layer, hidden)
        return Verdict(self._decide(index, part, row, score, logit), torch.from_numpy(score))

    def _combine(self, score: Any, before: Any, output: Any) -> Any:
        """Return hidden states after the layer from those before it and the layer's output: [chosen, hidden]."""
        import torch

        r = score[:, None]
        gate = {"raw": r, "sigmoid": torch.sigmoid(r), "none": torch.ones_like(r)}[self._contract.gate]
        return before + gate * (output - before) if self._contract.combine == "delta" else gate * output

    def _score(self, index: int, part: int, row: int, layer: Any, hidden: Any) -> tuple[FloatArray, FloatArray]:
        """Return a router's r and the logit of the causal rule, float32 [tokens]."""
        x = router_input(self._contract, self._decoder, layer, hidden)
        first = self._first_prompt(row, len(hidden)) if self._contract.level == "sequence" else 0
        if first:
            x = x[:first].mean(dim=0, keepdim=True)
        score, logit = score_of(self._contract, self._routers[index, part], x, self._epsilon)
        if score.isnan().any() or logit.isnan().any():
            raise DynexportError(
                f"{self._source}: layer {index}: expected router scores that are numbers, found NaN: the hidden "
                "states before this layer are not finite, see the layers before it"
            )
        if first:
            return self._of_sequence(index, float(score[0]), first, len(hidden))
        return score.numpy(), logit.numpy()

    def _first_prompt(self, row: int, tokens: int) -> int:
        """Return the number of a row's tokens that decide about it: its first prompt, else one token."""
        assert self._pass is not None
        return next((stop for start, stop in self._pass.prompted[row] if stop > start), min(1, tokens))

    def _of_sequence(self, index: int, score: float, first: int, tokens: int) -> tuple[FloatArray, FloatArray]:
        """Return the score and the logit of all tokens of a sequence, which its first ones decide about."""
        (runs,), _ = self._causal(index, np.full(1, score, np.float32))
        scores = np.full(tokens, score, np.float32)
        logits = scores.copy()
        scores[first:], logits[first:] = 0, np.inf if runs else -np.inf
        return scores, logits

    def _decide(self, index: int, part: int, row: int, score: FloatArray, logit: FloatArray) -> BoolArray:
        """Return which tokens of a row run in a layer or its part, bool [tokens], and record the routes."""
        assert self._pass is not None
        place = self._contract.routed_layers.index(index) * self._parts + part
        chosen, margin = self._causal(index, logit)
        chosen[: self._contract.keep_first] = True
        if self._contract.prefill == "topk":
            for start, stop in self._pass.prompted[row]:
                chosen[start:stop], margin[start:stop] = top_k(self._contract, score[start:stop])
        if self._pass.forced is not None:
            chosen = self._pass.forced[row][place].copy()
        # Cache slots are filled in the order of positions.
        turned_away = np.flatnonzero(chosen)[self._slots if part == 0 else len(chosen) :]
        chosen[turned_away] = False
        routes = self._pass.routes[row]
        routes.chosen[place], routes.score[place], routes.margin[place] = chosen, score, margin
        routes.overflow[place] = len(turned_away)
        return chosen

    def _causal(self, index: int, logit: FloatArray) -> tuple[BoolArray, FloatArray]:
        """Return the decision that depends on the token alone, and its margin."""
        import torch

        decision = self._contract.decision
        probability = torch.sigmoid(torch.from_numpy(logit)).numpy()
        threshold = np.float32(self._contract.threshold(index))
        chosen = probability > threshold if decision.comparison == ">" else probability >= threshold
        if decision.rule == "always":
            chosen = np.ones(len(logit), bool)
        return chosen, np.abs(probability - threshold)

    def _read_routers(self) -> None:
        """Read the routers and adapters of all routed layers."""
        contract, tensors, hidden = self._contract, self._weights.tensors, self._model.config.hidden_size
        self._parts = contract.decisions_per_layer
        self._epsilon = float(getattr(self._model.config, "rms_norm_eps", 1e-6))
        self._routers: dict[tuple[int, int], Parts] = {}
        self._adapters: dict[int, Parts] = {}
        for layer in contract.routed_layers:
            if layer >= self.layers:
                raise DynexportError(
                    f"{self._source}: routed_layers: expected layers in 0..{self.layers - 1}, found {layer}"
                )
            for part, name in enumerate(("mod_router", "mod_mlp_router")[: self._parts]):
                self._routers[layer, part] = read_router(tensors, contract, layer, hidden, name)
            if contract.skip_branch == "adapter":
                self._adapters[layer] = read_adapter(tensors, layer, hidden)


def pick_chosen(contract: Mod, decoder: DecoderLayers, call: Call, row: int, rows: int, chosen: Any) -> Call:
    """Return a layer's arguments for the chosen tokens of a row; compact positions are 0, 1, 2, ..."""
    import torch

    picked = decoder.pick(call, row, rows, chosen)
    if contract.positions == "original":
        return picked
    first = decoder.pick(call, row, rows, torch.arange(len(chosen), device=chosen.device))
    return decoder.with_hidden(first, decoder.hidden(picked))


def router_input(contract: Mod, decoder: DecoderLayers, layer: Any, hidden: Any) -> Any:
    """Return the router's input: the layer's input, before or after the layer's input norm."""
    if contract.router_input == "hidden":
        return hidden
    if decoder.input_norm is None:
        raise DynexportError(
            f"router_input: expected hidden, as a {type(layer).__name__} has no input norm, found normed"
        )
    return layer.get_submodule(decoder.input_norm)(hidden)


def top_k_count(contract: Mod, tokens: int) -> int:
    """Return the number of a row's tokens that top-k chooses: max(1, rounding(capacity * tokens)).

    The capacity is taken as an exact decimal: 0.29 of 100 tokens is 29, but binary floating point rounds it to 28.
    """
    share = Decimal(str(contract.capacity)) * tokens
    return max(1, math.floor(share) if contract.rounding == "floor" else math.ceil(share))


def top_k(contract: Mod, score: FloatArray) -> tuple[BoolArray, FloatArray]:
    """Choose the tokens with the k largest r; the lower position wins ties.

    Args:
        contract: the contract, for its capacity.
        score: float32 [tokens].

    Returns:
        The chosen tokens, bool [tokens]; and each score's distance to the other side of the choice, float32 [tokens].
    """
    chosen = np.zeros(len(score), bool)
    if not len(score):
        return chosen, np.zeros(0, np.float32)
    k = top_k_count(contract, len(score))
    order = sorted(range(len(score)), key=lambda position: (-score[position], position))
    if contract.boundary == "k-1":
        return _above(score, score[order[k - 1]], inclusive=k == 1)
    chosen[order[:k]] = True
    worst_in = score[order[k - 1]]
    best_out = score[order[k]] if k < len(order) else np.float32(-np.inf)
    return chosen, np.where(chosen, score - best_out, worst_in - score).astype(np.float32)


def _above(score: FloatArray, limit: np.float32, *, inclusive: bool) -> tuple[BoolArray, FloatArray]:
    """Choose the tokens with a score above a limit; also return each score's distance to the other side."""
    chosen = score >= limit if inclusive else score > limit
    worst_in = score[chosen].min(initial=np.inf)
    best_out = score[~chosen].max(initial=-np.inf)
    return chosen, np.where(chosen, score - best_out, worst_in - score).astype(np.float32)
