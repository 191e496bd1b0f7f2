"""Golden vectors: PyTorch's answers to a few rows, kept in the bundle so that a machine without torch can verify."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.reference import Answer, Case, RowPaths, RowRoutes
from dynexport.exporter.strategies import strategies
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Manifest, Speedup
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
_ROUTES: dict[str, type[RowRoutes | RowPaths]] = {"mod": RowRoutes, "radial": RowPaths}


@dataclass(frozen=True)
class GoldenRow:
    """The answer to one sequence.

    Attributes:
        speedup: name of the kept set that the forced tokens run in; "dense" is all layers, or where routers say.
        tokens: int64 [length]; those after the prompt are fed one by one.
        answer: logits after each of the last few tokens, and routes.
    """

    speedup: str
    tokens: np.ndarray
    prompt_length: int
    answer: Answer


def write_golden(path: Path, checkpoint: Checkpoint, manifest: Manifest) -> tuple[int, str]:
    """Compute golden rows, reading one layer at a time, and write them; (rows, "") or (0, why there are none)."""
    try:
        oracle = strategies()[manifest.contract.strategy].oracle(checkpoint, manifest, streaming=True)
    except DynexportError as error:
        if isinstance(error.__cause__, ImportError):
            return 0, str(error)
        raise
    full = Speedup(name="dense", ratio=1.0, keep=tuple(range(manifest.model.layers)))
    tokens = _sequence(checkpoint, manifest)
    prompts = [length for length in _PROMPT_LENGTHS if length < len(tokens)]
    if not prompts:
        return 0, f"a context of {len(tokens)} token leaves nothing to compare"
    cases = [
        Case(tuple(tokens), ((0, length),), speedup)
        for speedup in (full, *manifest.speedups)
        for length in (prompts if speedup is full else prompts[-1:])
    ]
    answers = oracle.answers(cases, last=min(_COMPARED, len(tokens) - max(prompts)))
    tensors: dict[str, np.ndarray] = {"tokens": np.asarray(tokens, np.int64)}
    for case, answer in zip(cases, answers, strict=True):
        name = f"{case.speedup.name}.{case.prompted[0][1]}"
        tensors[name] = answer.logits
        if answer.routes is not None:
            tensors |= {f"{name}.{part}": getattr(answer.routes, part) for part in _parts(type(answer.routes))}
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors makes it for its owner alone
    return len(cases), ""


def read_golden(path: Path, manifest: Manifest) -> list[GoldenRow]:
    """The golden rows of a bundle.

    Raises:
        DynexportError: when the file cannot be read, or holds something else.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DynexportError(f"{path}: expected golden vectors, found: {error}") from error
    tokens = tensors.pop("tokens", np.zeros(0, np.int64))
    names = sorted(name for name in tensors if name.rpartition(".")[2].isdigit())
    return [_golden_row(path, name, tokens, tensors, manifest) for name in names]


def _golden_row(
    path: Path, name: str, tokens: np.ndarray, tensors: dict[str, np.ndarray], manifest: Manifest
) -> GoldenRow:
    logits = tensors[name]
    speedup, _, length = name.rpartition(".")
    if not 1 <= int(length) < len(tokens) or not 1 <= len(logits) < len(tokens):
        raise DynexportError(f"{path}: {name}: expected logits of a golden row, found something else")
    kind = _ROUTES.get(manifest.contract.strategy)
    if kind is None:
        return GoldenRow(speedup, tokens, int(length), Answer(logits))
    parts = {part: tensors.get(f"{name}.{part}", np.zeros(0)) for part in _parts(kind)}
    rows = len(manifest.routed.layers) if manifest.routed else getattr(manifest.contract, "max_steps", 0)
    shapes = {"overflow": (rows,), "depth": (len(tokens),)}
    for part, values in parts.items():
        if values.shape != (expected := shapes.get(part, (rows, len(tokens)))):
            raise DynexportError(
                f"{path}: {name}.{part}: expected {list(expected)} for {len(tokens)} tokens, found {list(values.shape)}"
            )
    return GoldenRow(speedup, tokens, int(length), Answer(logits, kind(**parts)))


def _parts(kind: type[RowRoutes | RowPaths]) -> list[str]:
    """Names of what a row's routes consist of, each a tensor beside its logits."""
    return [part.name for part in dataclasses.fields(kind)]


def _sequence(checkpoint: Checkpoint, manifest: Manifest) -> list[int]:
    """Real text where there is a tokenizer, else random ids, cut to the context."""
    vocabulary = manifest.model.vocab_size
    ids: list[int] = np.random.default_rng(0).integers(0, vocabulary, _LENGTH).tolist()
    if "tokenizer.json" in checkpoint.files:
        encoded = Text.from_files(checkpoint.files).encode(_TEXT)
        if len(encoded) >= _LENGTH and max(encoded) < vocabulary:
            ids = encoded
    return ids[: min(_LENGTH, manifest.model.max_length)]
