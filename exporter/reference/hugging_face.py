"""The PyTorch reference: transformers' own modules, where each layer gets only the tokens that run in it.

Embedding, positions, masks, layers, final norm and head are transformers' code. This module adds the routing
contract's definition of a skip: a token that skips a layer keeps its hidden state and leaves no K/V entry there, so the
layer is called without that token. Every result is recomputed from the tokens, without a KV cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.errors import DynexportError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
RunsFor = Callable[[int, int], BoolArray]
Runs = Sequence[BoolArray] | RunsFor
"""Which tokens run in which layer: for every row bool [layers, length], or a function of (row, length)."""


class Reference:
    """A causal language model in float32 that runs given tokens in given layers.

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
            checkpoint: weights under Hugging Face names and layouts.
            streaming: read each layer's weights just before it runs and free them right after, in every pass. Memory
                then holds the embedding, the head and one layer.

        Raises:
            DynexportError: when torch or transformers is missing, transformers cannot build the model, or a
                tensor is absent or of another shape.
        """
        return cls(Weights(checkpoint, streaming=streaming), checkpoint.source)

    def logits(
        self, tokens: Sequence[Sequence[int]], runs: Runs | None = None, *, at: Sequence[int] = ()
    ) -> list[FloatArray]:
        """Return teacher-forced logits.

        Args:
            tokens: rows of token ids; their lengths may differ, unless ``at`` is given.
            runs: which tokens run in which layer; None: every token runs in every layer.
            at: positions to compute the head for; empty: every position.

        Returns:
            For every row, float32 [length or len(at), vocabulary].

        Raises:
            DynexportError: on an empty or too long row, an unknown token id, or runs of another shape.
        """
        if len(at) and len({len(ids) for ids in tokens}) > 1:
            raise DynexportError(f"{self._source}: at: expected rows of one length, found several")
        logits = self._forward(tokens, runs, at=at)
        return [as_numpy(logits[row, : len(at) or len(ids)]) for row, ids in enumerate(tokens)]

    def layer_outputs(self, tokens: Sequence[Sequence[int]], runs: Runs | None = None) -> list[FloatArray]:
        """Return the hidden states after every layer, to find the first layer whose output diverges.

        Arguments and errors are those of ``logits``.

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
        """Generate greedily for all rows together; every step recomputes every row.

        Args:
            prompts: rows of token ids.
            steps: number of tokens to generate, at least 1; end-of-sequence tokens do not stop it.
            runs_for: (row, length) -> bool [layers, length]; None: every token runs in every layer.

        Returns:
            Tokens int64 [rows, steps], and the logits float32 [rows, steps, vocabulary] that each was picked
            from. Among equal logits, the lowest token id is picked.

        Raises:
            DynexportError: for the errors of ``logits``, or when ``steps`` is below 1.
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
        """Run all rows, right-padded, and return logits [rows, longest or len(at), vocabulary].

        Padding runs in no layer. The mask of ones stops transformers from inferring padding. The hidden states after
        each layer are appended to ``outputs``.
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
        """Make the model's forward pass call ``_run_layer`` in place of every layer, inside the context."""

        def forward(index: int, call: Call) -> Any:
            after = self._run_layer(index, runs[:, index], call)
            if outputs is not None:
                outputs.append(after)
            return after

        with self._decoder.replaced(forward):
            yield

    def _run_layer(self, index: int, runs: BoolArray, call: Call) -> Any:
        """Run the layer, row by row, over its tokens; all other tokens keep their hidden states.

        Args:
            index: layer number.
            runs: bool [rows, longest], the tokens that run.
            call: arguments that the model passes to the layer.

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
                    picked = self._decoder.pick(call, row, len(runs), chosen)
                    after[row, chosen] = self._weights.run(layer, picked, row, chosen, self._place(index))[0]
        return after

    def _place(self, index: int) -> int:
        """Return the place of the keys and values that a layer makes now; a layer runs once, so it is its number."""
        return index

    def _check_tokens(self, tokens: Sequence[Sequence[int]]) -> None:
        """Raise DynexportError for a token id or a position that the model does not have."""
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
        """Return bool [rows, layers, longest]; padding runs in no layer."""
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
    """Return the number of tokens that the model has well-defined positions for; bloom has no limit.

    longrope picks its frequencies by the longest row of the batch. Beyond the original length, the result of one row
    would depend on the other rows, unless both sets of frequencies are equal (``set_context``).
    """
    rope = getattr(config, "rope_parameters", None) or {}
    changes = rope.get("rope_type") == "longrope" and rope.get("short_factor") != rope.get("long_factor")
    original = rope.get("original_max_position_embeddings") if changes else None
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return min(int(original or longest), int(longest))


def as_numpy(tensor: Any) -> FloatArray:
    """Return a float32 copy that does not keep a larger tensor in memory."""
    return np.array(tensor.numpy(), dtype=np.float32)
