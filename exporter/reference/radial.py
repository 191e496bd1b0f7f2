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
from numpy.typing import NDArray

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.hugging_face import (
    BoolArray,
    FloatArray,
    Reference,
    Runs,
    _numpy,
)
from dynexport.exporter.reference.mod import _read
from dynexport.exporter.reference.stored import Tensors
from dynexport.exporter.reference.transformers_layers import Call, DecoderLayers, norm_epsilon, tested_version
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.decisions import TURNED_AWAY

IntArray = NDArray[np.int64]

GONE = -1
# Tokens that an engine's single graph runs together: from, up to, and how many of them a layer takes in a step.
Room = tuple[int, int, int]


@dataclass
class RowPaths:
    """What happened to one row. Where a token had left before, or had nothing left to choose, ``path`` is -1.

    Attributes:
        path: int64 [max_steps, tokens], the chosen layer of each step; as many as there are layers: exit. Of an
            engine's single graph also ``TURNED_AWAY``, where the layer was full and the token did not run.
        score: float32 [max_steps, tokens], of the choice; 0 where there was none.
        margin: float32 [max_steps, tokens], the best allowed score minus the second; infinite where there were not two.
        probability: float32 [max_steps, tokens], of the choice among the allowed ones; 0 where there was none.
        depth: int64 [tokens], layers that ran.
    """

    path: IntArray
    score: FloatArray
    margin: FloatArray
    probability: FloatArray
    depth: IntArray

    @property
    def decisions(self) -> IntArray:
        """What was decided, for each step and token."""
        return self.path

    @property
    def runs(self) -> int:
        """How often a token ran in a layer."""
        return int(self.depth.sum())

    @property
    def overflow(self) -> IntArray:
        """How often a full layer turned a token away, int64 [1]."""
        return np.array([(self.path == TURNED_AWAY).sum()])

    @classmethod
    def empty(cls, steps: int, tokens: int) -> RowPaths:
        """Nobody has chosen anything."""
        zeros = np.zeros((steps, tokens), np.float32)
        return cls(
            path=np.full((steps, tokens), GONE, np.int64),
            score=zeros,
            margin=np.full_like(zeros, np.inf),
            probability=zeros.copy(),
            depth=np.zeros(tokens, np.int64),
        )


@dataclass
class _Entries:
    """K/V entries that belong together, in the order they were made.

    Attributes:
        positions: int64 [entries], original positions of the tokens that made them.
        keys, values: float32 [1, heads, entries, head size]; None as long as there are none.
    """

    positions: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: Any = None
    values: Any = None

    def add(self, positions: IntArray, keys: Any, values: Any) -> None:
        import torch

        self.positions = np.concatenate([self.positions, positions])
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)


@dataclass
class _Row:
    """One row under way.

    Attributes:
        number: among the rows of the pass.
        hidden: float32 [tokens, hidden].
        inside: bool [tokens], who has not left.
        visited: bool [tokens, layers].
        entries: by step or by layer, as the cache policy has it.
        forced: int64 [max_steps, tokens], choices to make instead of the router's own.
        room: where layers take so many tokens only; elsewhere they take all.
    """

    number: int
    hidden: Any
    inside: BoolArray
    visited: BoolArray
    forced: IntArray | None
    paths: RowPaths
    room: Sequence[Room] = ()
    entries: dict[int, _Entries] = field(default_factory=dict)


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


class ShownEntries:
    """Takes the place of transformers' cache for one call of one layer."""

    def __init__(self, shown: tuple[Any, Any] | None = None) -> None:
        """``shown``: keys and values [rows, heads, entries, head size] to attend to; None: those that it makes."""
        self._shown = shown
        self._made: tuple[Any, Any] | None = None

    @property
    def made(self) -> tuple[Any, Any]:
        """The keys and values [rows, heads, tokens, head size] that the layer made, rotary applied.

        Raises:
            DynexportError: when the layer has not asked for any.
        """
        if self._made is None:
            raise DynexportError(
                "radial: expected layers that pass new keys and values to a cache, found ones that do not; "
                f"{tested_version()}"
            )
        return self._made

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """What an attention module calls with its new keys and values: those that it shall attend to."""
        self._made = keys, values
        return self._shown or self._made


class RadialReference(Reference):
    """A model whose tokens go from layer to layer as a router says (docs/routing-contract.md, radial)."""

    def __init__(self, weights: Weights, contract: Radial) -> None:
        super().__init__(weights, weights.source)
        self._contract = contract
        self._check_pool()
        self._epsilon = router_epsilon(self._decoder)
        steps: Sequence[int | None] = [None] if contract.router.shared else range(contract.max_steps)
        self._routers = [self._read_router(weights.tensors, step) for step in steps]
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
        return [_numpy(stacked[row, :, : len(ids)]) for row, ids in enumerate(tokens)], routing.paths

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
                self._choose(step, row)
                self._turn_away(step, row)
            self._with_layers(step, rows, self._make_entries)
            self._with_layers(step, rows, self._attend)
            after = hidden.clone()
            for row in rows:
                after[row.number, : len(row.hidden)] = row.hidden
            if self._pass.outputs is not None:
                self._pass.outputs.append(after)
        return after

    def _start(self, number: int, embedding: Any) -> _Row:
        assert self._pass is not None
        forced, room, tokens = self._pass.forced, self._pass.room, len(embedding)
        return _Row(
            number=number,
            hidden=embedding.clone(),
            inside=np.ones(tokens, bool),
            visited=np.zeros((tokens, self.layers), bool),
            forced=None if forced is None else forced[number],
            paths=self._pass.paths[number],
            room=() if room is None else room[number],
        )

    def _with_layers(
        self, step: int, rows: Sequence[_Row], act: Callable[[int, int, Any, _Row, IntArray], None]
    ) -> None:
        """Call ``act`` with every layer that is chosen in this step, and the tokens of each row that chose it."""
        for index in range(self.layers):
            chosen = [(row, np.flatnonzero(row.paths.path[step] == index)) for row in rows]
            if not any(len(tokens) for _, tokens in chosen):
                continue
            with self._weights.layer(index) as layer:
                for row, tokens in chosen:
                    if len(tokens):
                        act(step, index, layer, row, tokens)

    def _make_entries(self, step: int, index: int, layer: Any, row: _Row, tokens: IntArray) -> None:
        """Keys and values of the tokens that chose this layer; what else comes out is not looked at."""
        cache = ShownEntries()
        self._decoder.run(layer, self._call(index, row, tokens, tokens, cache))
        row.entries.setdefault(self._owner(step, index), _Entries()).add(tokens, *cache.made)

    def _attend(self, step: int, index: int, layer: Any, row: _Row, tokens: IntArray) -> None:
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

    def _call(self, index: int, row: _Row, queries: IntArray, keys: IntArray, cache: ShownEntries) -> Call:
        """A layer's arguments for the tokens ``queries``, which attend to entries at the positions ``keys``."""
        import torch

        assert self._pass is not None
        given, rows = self._pass.inputs[index], len(self._pass.paths)
        call = self._decoder.pick(given, row.number, rows, torch.from_numpy(queries), torch.from_numpy(keys))
        return self._decoder.with_cache(self._decoder.with_hidden(call, row.hidden[None, queries]), cache)

    # The router.

    def _choose(self, step: int, row: _Row) -> None:
        """Let every token that has not left choose, and write it down; who exits or has nothing left leaves."""
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
        row.inside[asked] = choice < self.layers

    def _turn_away(self, step: int, row: _Row) -> None:
        """Of the tokens that run together and chose a layer, the first ones run; the others stay as they are."""
        for start, stop, places in row.room:
            path = row.paths.path[step, start:stop]
            for index in range(self.layers):
                path[np.flatnonzero(path == index)[places:]] = TURNED_AWAY

    def _allowed(self, step: int, visited: BoolArray) -> BoolArray:
        """Which choices tokens have: bool [tokens, choices]."""
        allowed = np.ones((len(visited), self._contract.choices(self.layers)), bool)
        if not self._contract.allow_reuse:
            allowed[:, : self.layers] = ~visited
        if self._contract.exit:
            allowed[:, self.layers] = step >= self._contract.min_steps
        return allowed

    def _scores(self, step: int, row: _Row, asked: IntArray) -> FloatArray:
        """fc2(silu(fc1(rms_norm(h)))) of some tokens: float32 [tokens, choices]."""
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
        return _numpy(scores)

    # What is refused.

    def _check_choices(self, step: int, row: _Row, asked: IntArray, allowed: BoolArray) -> None:
        """Raise DynexportError on a forced choice that is not among a token's choices."""
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

    def _read_router(self, tensors: Tensors, step: int | None) -> dict[str, Any]:
        """The float32 tensors of the router of a step, or of the shared one, by their names within it."""
        import torch

        prefix = "model.radial_router." if step is None else f"model.radial_router.{step}."
        contract, hidden = self._contract, self._model.config.hidden_size
        width, choices = contract.router.hidden, contract.choices(self.layers)
        bias = prefix + "fc2.bias"
        if bias in tensors.names and tensors.shape(bias) != (choices,):
            raise DynexportError(
                f"{self._source}: tensor {bias}: expected {choices} scores, for {self.layers} layers and "
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
        return {name: torch.from_numpy(_read(tensors, prefix + name, shape)) for name, shape in shapes.items()}


def router_epsilon(decoder: DecoderLayers) -> float:
    """The epsilon of the router's norm: that of the norm at the entrance of the pool's layers.

    Raises:
        DynexportError: when they have none.
    """
    if decoder.input_norm is None:
        raise DynexportError(
            f"radial: expected layers with an input norm, found a {type(decoder.modules[0]).__name__}, which has none"
        )
    return norm_epsilon(decoder.modules[0].get_submodule(decoder.input_norm))


def _softmax(scores: FloatArray) -> FloatArray:
    import torch

    return _numpy(torch.softmax(torch.from_numpy(scores), dim=-1))
