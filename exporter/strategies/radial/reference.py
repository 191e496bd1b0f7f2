"""Radial networks, told once more in plain words for the golden: step by step, layer by layer, row by row.

The pool is the checkpoint's decoder layers, as transformers has them. Two of its habits are used to stay out of its
way. First, the model's own forward pass computes the embedding and everything that layers are given beside hidden
states (masks, rotary angles, ALiBi), and later the final norm and the head: the first layers only take notes, and the
last one's place is where all steps happen. Second, attention hands its new keys and values to a cache object and
attends to what that gives back: here, to the entries that the contract makes visible.

A step first lets every token make its entry and then lets every token attend. As the steps before are done and later
ones are not, all entries there are have a tag <= this step, and what remains of both cache policies is where an entry
is kept: under its step or under its layer. Which of them a token sees, the mask of the layer it runs in says, by
original positions; so layers with and without a window, or with and without rotary, may stand in one pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, Reference, Runs, as_numpy
from dynexport.exporter.reference.rows import IntArray, RowPaths
from dynexport.exporter.reference.transformers_layers import Call
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.radial.reference_choices import Room, Routers, Row
from dynexport.exporter.strategies.radial.reference_entries import Entries, ShownEntries
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError


@dataclass
class _Pass:
    """One pass over some rows: what is given to it, and what is written down.

    Attributes:
        inputs: by layer, what the model's forward pass gives it.
        outputs: after each step hidden states [rows, longest, hidden]; None: not wanted.
    """

    forced: Sequence[IntArray] | None
    room: Sequence[Sequence[Room]] | None
    paths: list[RowPaths]
    outputs: list[Any] | None
    inputs: list[Call] = field(default_factory=list)


class RadialReference(Reference):
    """A model whose tokens go from layer to layer as a router says (docs/routing-contract.md, radial)."""

    def __init__(self, weights: Weights, contract: Radial) -> None:
        super().__init__(weights, weights.source)
        self._contract = contract
        self._check_pool()
        self._routers = Routers(weights, contract, self._decoder)
        self._pass: _Pass | None = None

    @classmethod
    def from_checkpoint(  # type: ignore[override]
        cls, checkpoint: Checkpoint, *, streaming: bool = False, contract: Radial
    ) -> RadialReference:
        """Build the model of ``checkpoint.config`` and load its weights and routers.

        Args:
            checkpoint: Hugging Face names and layouts, routers under the contract's names.
            streaming: as for ``Reference.from_checkpoint``: a layer is read twice in every step in which some token
                chooses it. Routers, which are small, always stay in memory.
            contract: what the routers mean.

        Raises:
            DynexportError: as ``Reference.from_checkpoint``, or when layers of the pool have different shapes, or a
                router's tensor is absent, of another shape, or not finite.
        """
        return cls(Weights(checkpoint, streaming=streaming), contract)

    def routed_logits(
        self,
        tokens: Sequence[Sequence[int]],
        forced: Sequence[IntArray] | None = None,
        *,
        at: Sequence[int] = (),
        room: Sequence[Sequence[Room]] | None = None,
    ) -> tuple[list[FloatArray], list[RowPaths]]:
        """Teacher-forced logits and paths.

        Args:
            tokens: rows of token ids; their lengths may differ, unless ``at`` is given.
            forced: int64 [max_steps, tokens] per row, in the form of ``RowPaths.path``, choices to make instead of
                the router's own. The gate then is the forced choice's probability among the allowed ones.
            at: compute the head for the tokens at these positions only; empty: for all.
            room: per row, where layers take so many tokens of a run only, the first that choose them; those turned
                away keep their hidden states and may choose the layer again. None: all have room.

        Returns:
            float32 [length or positions, vocabulary] per row, and what each row's tokens did.

        Raises:
            DynexportError: as ``Reference.logits``; on forced choices of another shape or that the contract does not
                allow, or a score that is NaN or infinite.
        """
        with self._routing(tokens, forced, room=room) as routing:
            return self.logits(tokens, at=at), routing.paths

    def routed_step_outputs(
        self,
        tokens: Sequence[Sequence[int]],
        forced: Sequence[IntArray] | None = None,
        *,
        room: Sequence[Sequence[Room]] | None = None,
    ) -> tuple[list[FloatArray], list[RowPaths]]:
        """Hidden states after every step, float32 [max_steps, length, hidden] per row, and what each row's tokens did.

        Args and errors as for ``routed_logits``.
        """
        import torch

        with self._routing(tokens, forced, outputs=[], room=room) as routing:
            self._forward(tokens, None, at=(0,))
        assert routing.outputs is not None
        stacked = torch.stack(routing.outputs, dim=1)
        return [as_numpy(stacked[row, :, : len(ids)]) for row, ids in enumerate(tokens)], routing.paths

    def layer_outputs(self, tokens: Sequence[Sequence[int]], runs: Runs | None = None) -> list[FloatArray]:
        """Refused: what a radial network has is hidden states after every step."""
        raise DynexportError("layer_outputs: a radial network has no fixed order of layers: use routed_step_outputs")

    # One pass.

    @contextmanager
    def _routing(
        self,
        tokens: Sequence[Sequence[int]],
        forced: Sequence[IntArray] | None,
        outputs: list[Any] | None = None,
        room: Sequence[Sequence[Room]] | None = None,
    ) -> Iterator[_Pass]:
        """Within, a pass over ``tokens`` chooses as told and writes down what happened."""
        self._check_tokens(tokens)
        self._check_forced(tokens, forced)
        paths = [RowPaths.empty(self._contract.max_steps, len(ids)) for ids in tokens]
        self._pass = _Pass(forced, room, paths, outputs)
        try:
            yield self._pass
        finally:
            self._pass = None

    def _forward(
        self,
        tokens: Sequence[Sequence[int]],
        runs: Runs | None,
        outputs: list[Any] | None = None,
        *,
        at: Sequence[int] = (),
    ) -> Any:
        if runs is not None:
            raise DynexportError("runs: expected none, as the router decides: give forced paths to routed_logits")
        if self._pass is not None:
            return super()._forward(tokens, runs, outputs, at=at)
        with self._routing(tokens, None):
            return super()._forward(tokens, runs, outputs, at=at)

    def _run_layer(self, index: int, runs: BoolArray, call: Call) -> Any:
        """Take note of what the model gives a layer; in the last one's place, run all steps."""
        assert self._pass is not None
        self._pass.inputs.append(call)
        hidden = self._decoder.hidden(call)
        return self._run_steps(hidden, runs.sum(axis=1)) if index == self.layers - 1 else hidden

    def _run_steps(self, hidden: Any, lengths: IntArray) -> Any:
        """From the embedding to what the final norm is given: [rows, longest, hidden]."""
        assert self._pass is not None
        rows = [self._start(number, hidden[number, :length]) for number, length in enumerate(lengths)]
        after = hidden
        for step in range(self._contract.max_steps):
            for row in rows:
                self._routers.choose(step, row)
            self._with_layers(step, rows, self._make_entries)
            self._with_layers(step, rows, self._attend)
            after = hidden.clone()
            for row in rows:
                after[row.number, : len(row.hidden)] = row.hidden
            if self._pass.outputs is not None:
                self._pass.outputs.append(after)
        return after

    def _start(self, number: int, embedding: Any) -> Row:
        assert self._pass is not None
        forced, room, tokens = self._pass.forced, self._pass.room, len(embedding)
        return Row(
            number=number,
            hidden=embedding.clone(),
            inside=np.ones(tokens, bool),
            visited=np.zeros((tokens, self.layers), bool),
            forced=None if forced is None else forced[number],
            paths=self._pass.paths[number],
            room=() if room is None else room[number],
        )

    def _with_layers(self, step: int, rows: Sequence[Row], act: Callable[[int, int, Any, Row, IntArray], None]) -> None:
        """Call ``act`` with every layer that is chosen in this step, and the tokens of each row that chose it."""
        for index in range(self.layers):
            chosen = [(row, np.flatnonzero(row.paths.path[step] == index)) for row in rows]
            if not any(len(tokens) for _, tokens in chosen):
                continue
            with self._weights.layer(index) as layer:
                for row, tokens in chosen:
                    if len(tokens):
                        act(step, index, layer, row, tokens)

    def _make_entries(self, step: int, index: int, layer: Any, row: Row, tokens: IntArray) -> None:
        """Keys and values of the tokens that chose this layer; what else comes out is not looked at."""
        cache = ShownEntries()
        self._decoder.run(layer, self._call(index, row, tokens, tokens, cache))
        row.entries.setdefault(self._owner(step, index), Entries()).add(tokens, *cache.made)

    def _attend(self, step: int, index: int, layer: Any, row: Row, tokens: IntArray) -> None:
        """Hidden states of the tokens that chose this layer, which attend to all entries that it shows them."""
        import torch

        entries = row.entries[self._owner(step, index)]
        cache = ShownEntries((entries.keys, entries.values))
        y = self._decoder.run(layer, self._call(index, row, tokens, entries.positions, cache))[0]
        h = row.hidden[tokens]
        if self._contract.gate == "probability":
            y = h + torch.from_numpy(row.paths.probability[step, tokens])[:, None] * (y - h)
        row.hidden[tokens] = y
        row.visited[tokens, index] = True
        row.paths.depth[tokens] += 1

    def _owner(self, step: int, index: int) -> int:
        """What an entry belongs to."""
        return step if self._contract.cache_policy == "step" else index

    def _call(self, index: int, row: Row, queries: IntArray, keys: IntArray, cache: ShownEntries) -> Call:
        """A layer's arguments for the tokens ``queries``, which attend to entries at the positions ``keys``."""
        import torch

        assert self._pass is not None
        given, rows = self._pass.inputs[index], len(self._pass.paths)
        call = self._decoder.pick(given, row.number, rows, torch.from_numpy(queries), torch.from_numpy(keys))
        return self._decoder.with_cache(self._decoder.with_hidden(call, row.hidden[None, queries]), cache)

    # What is refused.

    def _check_forced(self, tokens: Sequence[Sequence[int]], forced: Sequence[IntArray] | None) -> None:
        if forced is None:
            return
        if len(forced) != len(tokens):
            raise DynexportError(f"forced: expected an entry for each of {len(tokens)} rows, found {len(forced)}")
        for row, (ids, path) in enumerate(zip(tokens, forced, strict=True)):
            expected = (self._contract.max_steps, len(ids))
            if path.shape != expected or path.dtype != np.int64:
                raise DynexportError(
                    f"forced path of row {row}: expected int64 {list(expected)}, found {path.dtype} {list(path.shape)}"
                )

    def _check_pool(self) -> None:
        """Raise DynexportError unless all layers have the same parameters: entries of one are shown to others."""
        shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in self._weights.layers]
        for index, found in enumerate(shapes):
            for name in sorted(shapes[0].keys() | found.keys()):
                if shapes[0].get(name) != found.get(name):
                    raise DynexportError(
                        f"{self._source}: layer {index}: {name}: expected shape {shapes[0].get(name)} as in layer 0, "
                        f"found {found.get(name)}: the layers of a radial pool must be alike"
                    )
