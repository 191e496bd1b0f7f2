"""Golden vectors: PyTorch's logits for a few rows, kept in the bundle so that a machine without torch can verify."""

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
# Prompt lengths of the dense rows; rows of a kept set take the last. All rows have the same tokens, so that the
# head, which needs the most memory, is computed for the last few positions of all of them.
_PROMPT_LENGTHS = (1, 7, 33)
_LENGTH = 41
_COMPARED = 8


@dataclass(frozen=True)
class GoldenRow:
    """Teacher-forced logits of one sequence.

    Attributes:
        speedup: name of the kept set that the forced tokens run in; "dense" is all layers.
        tokens: int64 [length]; those after the prompt are fed one by one.
        logits: float32 [n, vocab]: after each of the last n tokens.
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
    tokens = _sequence(checkpoint, manifest)
    prompts = [length for length in _PROMPT_LENGTHS if length < len(tokens)]
    if not prompts:
        return 0, f"a context of {len(tokens)} token leaves nothing to compare"
    rows = [(name, length) for name in kept for length in (prompts if name == "dense" else prompts[-1:])]
    runs = [unified_skip_runs(length, len(tokens), kept[name], layers) for name, length in rows]
    last = min(_COMPARED, len(tokens) - max(prompts))
    logits = reference.logits([tokens] * len(rows), runs, last=last)
    tensors = {f"{name}.{length}": values for (name, length), values in zip(rows, logits, strict=True)}
    save_file({"tokens": np.asarray(tokens, np.int64), **tensors}, path)
    path.chmod(0o644)  # safetensors makes it for its owner alone
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
    tokens = tensors.pop("tokens", np.zeros(0, np.int64))
    rows = []
    for name, logits in sorted(tensors.items()):
        speedup, _, length = name.rpartition(".")
        if not length.isdigit() or not 1 <= int(length) < len(tokens) or not 1 <= len(logits) < len(tokens):
            raise DynexportError(f"{path}: {name}: expected logits of a golden row, found something else")
        rows.append(GoldenRow(speedup, tokens, int(length), logits))
    return rows


def _sequence(checkpoint: Checkpoint, manifest: Manifest) -> list[int]:
    """Real text where there is a tokenizer, else random ids, cut to the context."""
    vocabulary = manifest.model.vocab_size
    ids: list[int] = np.random.default_rng(0).integers(0, vocabulary, _LENGTH).tolist()
    if "tokenizer.json" in checkpoint.files:
        encoded = Text.from_files(checkpoint.files).encode(_TEXT)
        if len(encoded) >= _LENGTH and max(encoded) < vocabulary:
            ids = encoded
    return ids[: min(_LENGTH, manifest.model.max_length)]
