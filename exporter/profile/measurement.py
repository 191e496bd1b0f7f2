"""Run a text through a checkpoint layer by layer and measure the contribution of each residual block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.checkpoint.sizes import check_sizes
from dynexport.exporter.families import read_architecture
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.profile.blocks import Reader, blocks_of
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import declared_contract, strategies
from dynexport.runtime.bundle.checks import checked_count, checked_kind, is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.measure.compared import text_windows

Array = NDArray[np.float64]
# Largest size of the hidden states held in memory; a longer text takes several passes over the weights.
_HELD_BYTES = 1 << 28


@dataclass(frozen=True)
class Ratios:
    """The relative size of a contribution R(x) per layer and token, by two common definitions; dimensionless.

    Attributes:
        of_input: ||R(x)|| / ||x||, float64 [layers, tokens].
        of_output: ||R(x)|| / ||x + R(x)||, likewise.
    """

    of_input: Array
    of_output: Array


@dataclass(frozen=True)
class Measured:
    """The contributions measured on a text.

    Attributes:
        tokens: int64 [tokens], the windows in order.
        window: number of tokens per window; attention does not cross windows.
        blocks: name of a residual block -> its ratios: "attention" and "mlp", or "attention + mlp" if they run in
            parallel as one block.
        layer: ratios of whole layers, where R(x) is the sum of all that the layer adds.
        influence: 1 - cos(x, x + R(x)) of whole layers, float64 [layers, tokens]; its mean over tokens is the block
            influence of ShortGPT (arXiv 2403.03853).
    """

    tokens: NDArray[np.int64]
    window: int
    blocks: Mapping[str, Ratios]
    layer: Ratios
    influence: Array


def measure(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    *,
    window: int = 256,
    max_tokens: int = 4096,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run a text through transformers' modules in float32, every token in every layer.

    The text is cut into windows. Each layer's weights are read once and freed, if the hidden states of all tokens take
    at most 256 MiB; a longer text takes several passes.

    Args:
        checkpoint: a checkpoint without routers; it may declare a strategy that adds no tensors.
        ids: the token ids of the text.
        window: number of tokens per window; the remaining tokens are ignored.
        max_tokens: largest number of tokens to use.
        batch: number of windows that run together; it does not change the result.
        progress: called with the number of finished layer runs and their total.

    Returns:
        The ratios and influences of every layer and token.

    Raises:
        DynexportError: if the checkpoint has routers or is unsupported, the text is shorter than a window, a size is
            out of range, or torch or transformers is missing.
    """
    checked_kind("checkpoint", checkpoint, Checkpoint, "an opened checkpoint (open_checkpoint)")
    architecture = _check(checkpoint)
    batch = checked_count("batch", batch)
    if not is_integer(window) or not 1 <= window <= architecture.max_length:
        raise DynexportError(f"window: expected 1..{architecture.max_length} tokens, found {shown(window)}")
    windows = text_windows(ids, window, max_tokens, architecture.vocab_size)
    runner = _Runner(checkpoint, architecture)
    passes = _split(windows, max(1, _HELD_BYTES // (4 * architecture.hidden_size * window)))
    steps = [_split(part, batch) for part in passes]
    total, done = architecture.layers * sum(map(len, steps)), 0
    results: list[list[_Step]] = [[] for _ in range(architecture.layers)]
    for groups in steps:
        for index, step in runner.run(groups):
            results[index].append(step)
            done += 1
            if progress is not None:
                progress(done, total)
    return _collect(windows, window, results)


def _check(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a checkpoint that can be profiled; raise DynexportError for others."""
    declared = declared_contract(checkpoint.config)
    strategy = declared.get("strategy") if isinstance(declared, dict) else None
    found = strategies().get(strategy) if isinstance(strategy, str) else None
    if declared is not None and (found is None or found.tensors):
        raise DynexportError(
            f"{checkpoint.source}: strategy: expected a dense checkpoint, found {strategy!r:.80}; its layers were "
            "trained for the tokens that routers send there, and what they would add to all others means nothing "
            "(dynexport run BUNDLE --trace F.png shows which token runs where)"
        )
    check_sizes(checkpoint)
    return read_architecture(checkpoint.config)


def _split(windows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [windows[start : start + size] for start in range(0, len(windows), size)]


@dataclass(frozen=True)
class _Step:
    """One layer's results on a group of windows: float64 [rows * length] each, ratios as (of input, of output)."""

    blocks: Mapping[str, tuple[Array, Array]]
    layer: tuple[Array, Array]
    influence: Array


class _Runner:
    """Runs each layer over all groups of windows before the next layer.

    A layer's other inputs (positions, masks, biases) depend only on the sizes of a group. They are recorded in a
    forward pass of the model in which each layer returns its input.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self._weights = Weights(checkpoint, streaming=True)
        blocks = blocks_of(architecture)
        self._reader = Reader(blocks, checkpoint.source)
        self._is_parallel = architecture.residual == "parallel"

    def run(self, groups: Sequence[NDArray[np.int64]]) -> Iterator[tuple[int, _Step]]:
        """Yield the layer number and results of each layer and group; a group is int64 [rows, length]."""
        import torch

        inputs: dict[int, list[Call]] = {}
        hidden = []
        with torch.no_grad():
            for group in groups:
                first, others = self._layer_inputs(group)
                hidden.append(first)
                inputs.setdefault(len(group), others)
        for index in range(len(self._weights.layers)):
            with self._weights.layer(index) as layer:
                for number, before in enumerate(hidden):
                    call = self._weights.decoder.with_hidden(inputs[len(before)][index], before)
                    # no_grad does not enclose the yield: the caller keeps its own grad mode.
                    with torch.no_grad():
                        after, attention, mlp = self._reader.run(index, layer, before, call)
                        step = self._measured(before, after, attention, mlp)
                    hidden[number] = after
                    yield index, step

    def _layer_inputs(self, group: NDArray[np.int64]) -> tuple[Any, list[Call]]:
        """Return a group's hidden states before layer 0, and the arguments that the model passes to each layer."""
        import torch

        ids, decoder = torch.from_numpy(group), self._weights.decoder
        calls: list[Call] = []

        def note(_: int, call: Call) -> Any:
            calls.append(call)
            return decoder.hidden(call)

        with decoder.replaced(note):
            mask = torch.ones_like(ids)  # keeps transformers from guessing at padding
            self._weights.model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        return decoder.hidden(calls[0]), calls

    def _measured(self, before: Any, after: Any, attention: Any, mlp: Any) -> _Step:
        added = attention + mlp
        whole = _ratios(before, added, after)
        if self._is_parallel:
            blocks = {"attention + mlp": whole}
        else:
            between = before + attention
            blocks = {"attention": _ratios(before, attention, between), "mlp": _ratios(between, mlp, after)}
        return _Step(blocks, whole, _influence(before, added, after))


def _ratios(before: Any, added: Any, after: Any) -> tuple[Array, Array]:
    """Return ||added|| / ||before|| and ||added|| / ||after|| per token, with norms of at least float32's tiny."""
    import torch

    smallest = torch.finfo(torch.float32).tiny
    size, of_input, of_output = (torch.linalg.vector_norm(x.double(), dim=-1) for x in (added, before, after))
    return _flat(size / of_input.clamp_min(smallest)), _flat(size / of_output.clamp_min(smallest))


def _influence(before: Any, added: Any, after: Any) -> Array:
    """Return 1 - cos(before, after) of every token; 0 if the layer added 0."""
    import torch

    x, y = before.double(), after.double()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=0.0).nan_to_num(0.0)
    changed = (added != 0).any(dim=-1)
    return _flat(torch.where(changed, (1 - cosine).clamp_min(0), 0.0))


def _flat(tensor: Any) -> Array:
    return np.array(tensor.flatten().numpy(), np.float64)


def _collect(windows: NDArray[np.int64], window: int, results: Sequence[Sequence[_Step]]) -> Measured:
    """Join the results of all groups, which are in the order of the text."""

    def joined(pick: Callable[[_Step], Array]) -> Array:
        return np.stack([np.concatenate([pick(step) for step in steps]) for steps in results])

    def ratios(pick: Callable[[_Step], tuple[Array, Array]]) -> Ratios:
        return Ratios(joined(lambda step: pick(step)[0]), joined(lambda step: pick(step)[1]))

    def block(name: str) -> Ratios:
        return ratios(lambda step: step.blocks[name])

    return Measured(
        tokens=windows.ravel(),
        window=window,
        blocks={name: block(name) for name in results[0][0].blocks},
        layer=ratios(lambda step: step.layer),
        influence=joined(lambda step: step.influence),
    )
