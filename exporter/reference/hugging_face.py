"""The PyTorch golden: Hugging Face's own modules, with each layer given only the tokens that run in it.

Embedding, positions, masks, layers, final norm and head are transformers' code. All that is added here is the
routing contract's meaning of a route: a token that does not run in a layer keeps its hidden state and leaves
no K/V entry there, which is the same as that layer never seeing the token. Everything is recomputed from the
tokens; there is no cache that could be wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.transformers_layers import Call
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.errors import DynexportError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
RunsFor = Callable[[int, int], BoolArray]
Runs = Sequence[BoolArray] | RunsFor
"""Which tokens run in which layer: for every row bool [layers, length], or a function of (row, length)."""


class Reference:
    """A causal language model in float32 whose layers skip tokens as told.

    Attributes:
        layers: number of decoder layers.
    """

    def __init__(self, weights: Weights, source: str) -> None:
        self._weights = weights
        self._model = weights.model
        self._source = source
        self._decoder = weights.decoder
        self.layers = len(weights.layers)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, streaming: bool = False) -> Reference:
        """Build the model of ``checkpoint.config`` and load its weights.

        Args:
            checkpoint: Hugging Face names and layouts.
            streaming: read each layer's weights just before it runs and free them right after, in every pass:
                memory for embedding, head and one layer.

        Raises:
            DynexportError: when torch or transformers is missing, transformers cannot build the model, or a
                tensor is absent or of another shape.
        """
        return cls(Weights(checkpoint, streaming=streaming), checkpoint.source)

    def logits(
        self, tokens: Sequence[Sequence[int]], runs: Runs | None = None, *, at: Sequence[int] = ()
    ) -> list[FloatArray]:
        """Teacher-forced logits.

        Args:
            tokens: rows of token ids; their lengths may differ, unless ``at`` is given.
            runs: which tokens run in which layer; None: all in all.
            at: compute the head for the tokens at these positions only; empty: for all.

        Returns:
            For every row, float32 [length or positions, vocabulary].

        Raises:
            DynexportError: on an empty or too long row, an unknown token id, or runs of another shape.
        """
        if len(at) and len({len(ids) for ids in tokens}) > 1:
            raise DynexportError(f"{self._source}: at: expected rows of one length, found several")
        logits = self._forward(tokens, runs, at=at)
        return [as_numpy(logits[row, : len(at) or len(ids)]) for row, ids in enumerate(tokens)]

    def layer_outputs(self, tokens: Sequence[Sequence[int]], runs: Runs | None = None) -> list[FloatArray]:
        """Hidden states after every layer, to find the first layer where something else goes astray.

        Args and errors as for ``logits``.

        Returns:
            For every row, float32 [layers, length, hidden]; the final norm is not applied.
        """
        import torch

        outputs: list[Any] = []
        self._forward(tokens, runs, outputs)
        stacked = torch.stack(outputs, dim=1)
        return [as_numpy(stacked[row, :, : len(ids)]) for row, ids in enumerate(tokens)]

    def greedy(
        self, prompts: Sequence[Sequence[int]], steps: int, runs_for: RunsFor | None = None
    ) -> tuple[NDArray[np.int64], FloatArray]:
        """Generate at temperature 0, all rows together, recomputing every row at every step.

        Args:
            prompts: rows of token ids.
            steps: tokens to generate, at least 1; no end-of-sequence token is looked for.
            runs_for: (row, length) -> bool [layers, length]; None: all tokens run in all layers.

        Returns:
            Tokens int64 [rows, steps], and the logits float32 [rows, steps, vocabulary] that each was picked
            from; of equal logits the lowest token id wins.

        Raises:
            DynexportError: as ``logits``, or on less than one step.
        """
        if steps < 1:
            raise DynexportError(f"{self._source}: expected at least 1 step, found {steps}")
        rows = [list(prompt) for prompt in prompts]
        picked_from = []
        for _ in range(steps):
            last = np.stack([logits[-1] for logits in self.logits(rows, runs_for)])
            picked_from.append(last)
            for row, token in zip(rows, last.argmax(axis=-1), strict=True):
                row.append(int(token))
        tokens = np.array([row[-steps:] for row in rows], dtype=np.int64)
        return tokens, np.stack(picked_from, axis=1)

    def _forward(
        self,
        tokens: Sequence[Sequence[int]],
        runs: Runs | None,
        outputs: list[Any] | None = None,
        *,
        at: Sequence[int] = (),
    ) -> Any:
        """One pass over all rows, right-padded: logits [rows, longest or positions, vocabulary].

        Padding runs in no layer, so no layer sees it; the mask of ones keeps transformers from guessing at
        it. Hidden states after each layer are added to ``outputs``.
        """
        import torch

        self._check_tokens(tokens)
        row_runs = self._padded_runs(tokens, runs)
        ids = torch.zeros((len(tokens), max(map(len, tokens))), dtype=torch.int64)
        for row, row_tokens in enumerate(tokens):
            ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
        keep = torch.tensor(at) if len(at) else 0
        with torch.no_grad(), self._routed(row_runs, outputs):
            return self._model(ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=keep).logits

    @contextmanager
    def _routed(self, runs: BoolArray, outputs: list[Any] | None) -> Iterator[None]:
        """Within, the model's own forward pass calls ``_run_layer`` in place of every layer."""

        def forward(index: int, call: Call) -> Any:
            after = self._run_layer(index, runs[:, index], call)
            if outputs is not None:
                outputs.append(after)
            return after

        with self._decoder.replaced(forward):
            yield

    def _run_layer(self, index: int, runs: BoolArray, call: Call) -> Any:
        """Give the layer, row by row, the tokens that run in it; all others keep their hidden states.

        Args:
            index: of the layer.
            runs: bool [rows, longest].
            call: what the model passes to the layer.

        Returns:
            Hidden states [rows, longest, hidden].
        """
        import torch

        after = self._decoder.hidden(call).clone()
        if not runs.any():
            return after
        with self._weights.layer(index) as layer:
            for row, row_runs in enumerate(runs):
                chosen = torch.from_numpy(np.flatnonzero(row_runs))
                if len(chosen):
                    after[row, chosen] = self._decoder.run(layer, self._decoder.pick(call, row, len(runs), chosen))[0]
        return after

    def _check_tokens(self, tokens: Sequence[Sequence[int]]) -> None:
        """Raise DynexportError on what the model has no embedding or no position for."""
        vocabulary, longest = self._model.config.vocab_size, _max_length(self._model.config)
        if not tokens:
            raise DynexportError(f"{self._source}: expected at least one row of tokens, found none")
        for row, ids in enumerate(tokens):
            if not 1 <= len(ids) <= longest:
                raise DynexportError(f"{self._source}: row {row}: expected 1 to {longest} tokens, found {len(ids)}")
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                unknown = next(token for token in ids if not 0 <= token < vocabulary)
                raise DynexportError(
                    f"{self._source}: row {row}: expected token ids in 0..{vocabulary - 1}, found {unknown}"
                )

    def _padded_runs(self, tokens: Sequence[Sequence[int]], runs: Runs | None) -> BoolArray:
        """Bool [rows, layers, longest]; padding runs nowhere."""
        padded = np.zeros((len(tokens), self.layers, max(map(len, tokens))), dtype=np.bool_)
        if runs is not None and not callable(runs) and len(runs) != len(tokens):
            raise DynexportError(f"runs: expected an array for each of {len(tokens)} rows, found {len(runs)}")
        for row, length in enumerate(map(len, tokens)):
            expected = (self.layers, length)
            if runs is None:
                row_runs = np.ones(expected, dtype=np.bool_)
            else:
                row_runs = runs(row, length) if callable(runs) else runs[row]
            if row_runs.shape != expected or row_runs.dtype != np.bool_:
                raise DynexportError(
                    f"runs of row {row}: expected bool {list(expected)}, found {row_runs.dtype} {list(row_runs.shape)}"
                )
            padded[row, :, :length] = row_runs
        return padded


def _max_length(config: Any) -> int:
    """How many tokens the model has well-defined positions for; bloom has no limit.

    longrope's frequencies change for the whole batch with the length of its longest row: beyond the original length no
    answer belongs to a single row, unless both sets are the same (``set_context``).
    """
    rope = getattr(config, "rope_parameters", None) or {}
    changes = rope.get("rope_type") == "longrope" and rope.get("short_factor") != rope.get("long_factor")
    original = rope.get("original_max_position_embeddings") if changes else None
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return min(int(original or longest), int(longest))


def as_numpy(tensor: Any) -> FloatArray:
    """A float32 copy that keeps no larger tensor alive."""
    return np.array(tensor.numpy(), dtype=np.float32)
