"""An independent implementation of Radial Networks for the reference: hop by hop, layer by layer, row by row.

The pool is the decoder layers of the transformers model. The implementation relies on two properties of transformers.
First, the model's forward pass computes the embedding, the layers' other arguments (masks, rotary angles, ALiBi), the
final norm and the head. All layers but the last are replaced by code that records its arguments; the last is replaced
by code that runs all hops. Second, attention passes its new keys and values to a cache object and attends to the
returned ones: here, the entries that the contract makes visible.

In a hop, first every token makes its entry, then every token attends. Hops run in order, so all existing entries have a
hop <= the current one, and the two cache policies differ only in the key of an entry: its hop or its layer. The mask of
the token's layer selects the visible entries by original positions, so layers with and without a window, or with and
without rotary positions, can share a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, Reference, Runs, as_numpy
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.rows import IntArray, RowPaths
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.radial.reference_choices import Room, Routers, Row
from dynexport.exporter.strategies.radial.reference_entries import Entries, ShownEntries
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError


@dataclass
class _Pass:
    """The inputs and the records of one forward pass.

    Attributes:
        forced: forced choices per row, or None.
        room: the layers' room per row, or None.
        paths: the recorded paths, one per row.
        outputs: hidden states [rows, longest, hidden] after each hop; None does not record them.
        inputs: the arguments that the model's forward pass gives to each layer.
    """

    forced: Sequence[IntArray] | None
    room: Sequence[Sequence[Room]] | None
    paths: list[RowPaths]
    outputs: list[Any] | None
    inputs: list[Call] = field(default_factory=list)


class RadialReference(Reference):
    """A model whose router chooses every token's next layer (docs/routing-contract.md, radial)."""

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
            checkpoint: tensors with Hugging Face names and layouts, routers under the contract's names.
            streaming: as for ``Reference.from_checkpoint``; a layer is read twice in every hop in which a token chooses
                it. Routers are small and always stay in memory.
            contract: the contract of the routers.

        Raises:
            DynexportError: as ``Reference.from_checkpoint``; for layers of different shapes; for a router tensor that
                is absent, of another shape or not finite.
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
        """Return teacher-forced logits and paths.

        Args:
            tokens: rows of token ids; lengths may differ, unless ``at`` is given.
            forced: int64 [max_steps, tokens] per row, in the form of ``RowPaths.path``, choices that replace the
                router's. The gate is then the forced choice's probability among the allowed ones.
            at: positions to compute logits for; empty computes all.
            room: per row, the chunks in which a layer runs a limited number of tokens: the first that choose it. Other
                tokens keep their hidden states and may choose the layer again. None runs all.

        Returns:
            Logits, float32 [length or positions, vocabulary] per row, and the paths of each row.

        Raises:
            DynexportError: as ``Reference.logits``; for forced choices of another shape or that the contract does not
                allow; for a score that is NaN or infinite.
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
        """Return hidden states after every hop, float32 [max_steps, length, hidden] per row, and the paths.

        Arguments and errors are as for ``routed_logits``.
        """
        import torch

        with self._routing(tokens, forced, outputs=[], room=room) as routing:
            self._forward(tokens, None, at=(0,))
        assert routing.outputs is not None
        stacked = torch.stack(routing.outputs, dim=1)
        return [as_numpy(stacked[row, :, : len(ids)]) for row, ids in enumerate(tokens)], routing.paths

    def layer_outputs(self, tokens: Sequence[Sequence[int]], runs: Runs | None = None) -> list[FloatArray]:
        """Raise DynexportError: a Radial Network has hidden states per hop, not per layer."""
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
        """Make forward passes over ``tokens`` use these choices and limits, and record their paths."""
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
        """Record a layer's arguments; in place of the last layer, run all hops."""
        assert self._pass is not None
        self._pass.inputs.append(call)
        hidden = self._decoder.hidden(call)
        return self._run_steps(hidden, runs.sum(axis=1)) if index == self.layers - 1 else hidden

    def _run_steps(self, hidden: Any, lengths: IntArray) -> Any:
        """Run all hops on the embedding and return the final norm's input, [rows, longest, hidden]."""
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
        """Call ``act`` with every layer that is chosen in this hop and the tokens of each row that chose it."""
        for index in range(self.layers):
            chosen = [(row, np.flatnonzero(row.paths.path[step] == index)) for row in rows]
            if not any(len(tokens) for _, tokens in chosen):
                continue
            with self._weights.layer(index) as layer:
                for row, tokens in chosen:
                    if len(tokens):
                        act(step, index, layer, row, tokens)

    def _make_entries(self, step: int, index: int, layer: Any, row: Row, tokens: IntArray) -> None:
        """Compute and store keys and values of the tokens that chose this layer; ignore its other outputs."""
        cache = ShownEntries()
        self._decoder.run(layer, self._call(index, row, tokens, tokens, cache))
        row.entries.setdefault(self._owner(step, index), Entries()).add(tokens, *cache.made)

    def _attend(self, step: int, index: int, layer: Any, row: Row, tokens: IntArray) -> None:
        """Run the layer on the tokens that chose it, with the visible entries, and store their hidden states."""
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
        """Return the key of an entry: its hop or its layer."""
        return step if self._contract.cache_policy == "step" else index

    def _call(self, index: int, row: Row, queries: IntArray, keys: IntArray, cache: ShownEntries) -> Call:
        """Return a layer's arguments for the tokens ``queries``, which attend to entries at positions ``keys``."""
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
        """Raise DynexportError unless all layers have the same parameter shapes, as they share caches."""
        shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in self._weights.layers]
        for index, found in enumerate(shapes):
            for name in sorted(shapes[0].keys() | found.keys()):
                if shapes[0].get(name) != found.get(name):
                    raise DynexportError(
                        f"{self._source}: layer {index}: {name}: expected shape {shapes[0].get(name)} as in layer 0, "
                        f"found {found.get(name)}: the layers of a radial pool must be alike"
                    )
