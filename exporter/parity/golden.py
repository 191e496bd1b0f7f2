"""Golden vectors: what PyTorch computes for a few rows, kept in the bundle so that a machine without torch can verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.reference import Reference, unified_skip_runs
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Manifest
from dynexport.runtime.text import Text

_TEXT = (
    "The river had been rising since morning, and by noon the lower fields were under water. Nobody in the village "
    "was surprised; it happened every spring, and every spring the old bridge held. Still, the miller counted his "
    "sacks twice, moved the mule to higher ground, and sent his daughter to ask whether the ferry would run."
)
_PROMPT_LENGTHS = (1, 7, 33)
_FORCED = 12


@dataclass(frozen=True)
class GoldenRow:
    """Teacher-forced logits of one sequence.

    Attributes:
        speedup: name of the kept set that the forced tokens run in; "dense" is all layers.
        tokens: int64 [prompt_length + forced].
        logits: float32 [forced, vocab]: after the prompt, then after every forced token but the last.
    """

    speedup: str
    tokens: np.ndarray
    prompt_length: int
    logits: np.ndarray


def write_golden(path: Path, checkpoint: Checkpoint, manifest: Manifest) -> tuple[int, str]:
    """Compute golden rows, reading one layer at a time, and write them; (rows, "") or (0, why there are none)."""
    try:
        reference = Reference.from_checkpoint(checkpoint, streaming=True)
    except DynexportError as error:
        if isinstance(error.__cause__, ImportError):
            return 0, str(error)
        raise
    layers = manifest.model.layers
    kept = {"dense": tuple(range(layers)), **{speedup.name: speedup.keep for speedup in manifest.speedups}}
    rows = [(name, tokens, length) for name in kept for tokens, length in _sequences(checkpoint, manifest)]
    runs = [unified_skip_runs(length, len(tokens), kept[name], layers) for name, tokens, length in rows]
    logits = reference.logits([tokens for _, tokens, _ in rows], runs)
    tensors = {}
    for i, ((name, tokens, length), values) in enumerate(zip(rows, logits, strict=True)):
        tensors[f"{i}.{name}.{length}.tokens"] = np.asarray(tokens, np.int64)
        tensors[f"{i}.{name}.{length}.logits"] = np.ascontiguousarray(values[length - 1 : len(tokens) - 1])
    save_file(tensors, path)
    return len(rows), ""


def read_golden(path: Path) -> list[GoldenRow]:
    """The golden rows of a bundle.

    Raises:
        DynexportError: when the file cannot be read.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DynexportError(f"{path}: expected golden vectors, found: {error}") from error
    rows = []
    for name in sorted(name for name in tensors if name.endswith(".tokens")):
        base = name.removesuffix(".tokens")
        _, rest = base.split(".", 1)
        speedup, length = rest.rsplit(".", 1)
        rows.append(GoldenRow(speedup, tensors[name], int(length), tensors[f"{base}.logits"]))
    return rows


def _sequences(checkpoint: Checkpoint, manifest: Manifest) -> list[tuple[list[int], int]]:
    """(tokens, prompt length): real text where there is a tokenizer, else random ids, cut to the context."""
    length = max(_PROMPT_LENGTHS) + _FORCED
    vocabulary = manifest.model.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, length).tolist()
    if "tokenizer.json" in checkpoint.files:
        encoded = Text.from_files(checkpoint.files).encode(_TEXT)
        if len(encoded) >= length and max(encoded) < vocabulary:
            ids = encoded
    rows = []
    for prompt in _PROMPT_LENGTHS:
        total = min(prompt + _FORCED, manifest.model.max_length)
        if total > prompt:
            rows.append((ids[:total], prompt))
    return rows
