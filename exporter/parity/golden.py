"""Golden vectors: PyTorch's logits of a few rows, stored in the bundle for verification without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.parity.reach import golden_long_row, row_limit
from dynexport.exporter.parity.rounded import rounded_oracle, rounded_weights
from dynexport.exporter.parity.thresholds import Kind
from dynexport.exporter.reference import Answer, Case, Oracle, RowPaths, RowRoutes
from dynexport.exporter.reference.rounding import has_rounded_caches, is_rounded
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import DEQUANTISED, Depth, Manifest
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.text.text import Text

_TEXT = (
    "The river had been rising since morning, and by noon the lower fields were under water. Nobody in the village "
    "was surprised; it happened every spring, and every spring the old bridge held. Still, the miller counted his "
    "sacks twice, moved the mule to higher ground, and sent his daughter to ask whether the ferry would run."
)
# Prompt lengths of the rows at full depth; rows of a kept set use the last one. All rows have the same tokens and
# compare the same few last positions, because the head needs the most memory.
_PROMPT_LENGTHS = (1, 7, 33)
_LENGTH = 41
_COMPARED = 8
# Tokens per piece of a text that is continued by its shuffled pieces: distances between words then vary.
_TOGETHER = 8
_FORMS: dict[Kind, str] = {"reference": "", "arithmetic": "arithmetic/", "consistency": "rounding/"}
_ROUTES: dict[str, type[RowRoutes | RowPaths]] = {"layers": RowRoutes, "paths": RowPaths}


@dataclass(frozen=True)
class GoldenRow:
    """One row of a bundle's golden vectors, derived from the manifest.

    Attributes:
        name: name of its logits, and prefix of its routing tensors.
        tokens: name of the tensor with its token ids.
        depth: layers that tokens after the prompt run; routers choose among them.
        prompt: number of prompt tokens; each later token is a decode step.
        length: number of all tokens.
        positions: ascending positions whose logits are stored.
        kind: "reference" where PyTorch used the checkpoint's weights. Else it used the bundle's rounded numbers:
            "arithmetic" for weights alone; "consistency" for int8 caches, as a key near the middle between two
            integers may be rounded to another one than the engine's.
    """

    name: str
    tokens: str
    depth: Depth
    prompt: int
    length: int
    positions: tuple[int, ...]
    kind: Kind = "reference"

    @property
    def check(self) -> str:
        """Return the name of the check that compares the row."""
        name = self.name.removeprefix(DEQUANTISED).replace(".", "/")
        return f"{_FORMS[self.kind]}golden/{name}"

    @property
    def dequantised(self) -> bool:
        """Return whether PyTorch used the bundle's rounded numbers instead of the checkpoint's."""
        return self.kind != "reference"

    def case(self, tokens: np.ndarray) -> Case:
        """Return the row as a case of the reference; tokens int64 [length]."""
        return Case(tuple(tokens.tolist()), ((0, self.prompt),), self.depth)


def golden_rows(manifest: Manifest) -> tuple[GoldenRow, ...]:
    """Return the rows that a bundle's golden vectors must have, derived from the manifest."""
    full = manifest.full
    length = min(_LENGTH, row_limit(manifest))
    longest = (manifest.limits.whole_prompts and manifest.limits.prompt) or length
    prompts = [size for size in _PROMPT_LENGTHS if size < length and size <= longest]
    if not prompts:
        return ()
    positions = tuple(range(max(length - _COMPARED, max(prompts)), length))
    rows = [
        GoldenRow(f"{depth.name}.{prompt}", "tokens", depth, prompt, length, positions)
        for depth in (full, *manifest.depths)
        for prompt in (prompts if depth is full else prompts[-1:])
    ]
    row = golden_long_row(manifest)
    if row is not None:
        depth = (full, *manifest.depths)[-1]
        name = f"{depth.name}.long"
        rows.append(GoldenRow(name, "long_tokens", depth, row.prompt, row.length, row.positions))
    if is_rounded(manifest):
        kind: Kind = "consistency" if has_rounded_caches(manifest) else "arithmetic"
        rows += [dataclasses.replace(row, name=DEQUANTISED + row.name, kind=kind) for row in rows]
    return tuple(rows)


def write_golden(path: Path, checkpoint: Checkpoint, manifest: Manifest) -> tuple[int, str]:
    """Compute golden vectors one layer at a time and write them.

    Args:
        path: file to write, in the bundle's directory, which contains the graphs already.
        checkpoint: the model.
        manifest: the bundle's manifest.

    Returns:
        (number of rows, "") or (0, the reason why there are none).
    """
    try:
        weights = Weights(checkpoint, streaming=True, max_length=manifest.model.max_length)
    except DynexportError as error:
        if isinstance(error.__cause__, ImportError):
            return 0, str(error)
        raise
    rows = golden_rows(manifest)
    if not rows:
        return 0, f"a row of {row_limit(manifest)} token leaves nothing to compare"
    oracle = strategies()[manifest.contract.strategy].oracle(weights, manifest)
    tensors = _answers(checkpoint, manifest, oracle, [row for row in rows if not row.dequantised])
    if is_rounded(manifest):
        rounded = rounded_oracle(rounded_weights(weights, path.parent, manifest), path.parent, manifest)
        tensors |= _answers(checkpoint, manifest, rounded, [row for row in rows if row.dequantised])
    save_file(tensors, path, metadata={"reference": weights.loaded_by})
    path.chmod(0o644)  # safetensors creates it readable by the owner only
    return len(rows), ""


def _answers(
    checkpoint: Checkpoint, manifest: Manifest, oracle: Oracle, rows: Sequence[GoldenRow]
) -> dict[str, np.ndarray]:
    """Return the tensors of golden rows: tokens, logits and routing decisions."""
    tensors: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(row.tokens for row in rows):
        together = [row for row in rows if row.tokens == name]
        tensors[name] = _sequence(checkpoint, manifest, together[0].length)
        cases = [row.case(tensors[name]) for row in together]
        for row, answer in zip(together, oracle.answers(cases, at=together[0].positions), strict=True):
            tensors[row.name] = answer.logits
            if answer.routes is not None:
                tensors |= {f"{row.name}.{part}": getattr(answer.routes, part) for part in _parts(type(answer.routes))}
    return tensors


def golden_reference(path: Path | None) -> str:
    """Return the name of the loader that golden vectors were computed with; "" if it is not recorded."""
    if path is None:
        return ""
    with safe_open(path, framework="numpy") as file:
        said = (file.metadata() or {}).get("reference", "")
    return "".join(filter(str.isprintable, said))[:200]


def read_golden(path: Path, manifest: Manifest) -> dict[str, tuple[Case, Answer]]:
    """Return the golden rows that the file contains, by name; ``golden_rows`` lists the rows that it must contain.

    Raises:
        DynexportError: the file cannot be read, or has other content.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DynexportError(f"{path}: expected golden vectors, found: {error}") from error
    rows = golden_rows(manifest)
    kind = None if manifest.routing is None else _ROUTES[manifest.routing.kind]
    parts = [] if kind is None else _parts(kind)
    known = {f"{row.name}.{part}" for row in rows for part in parts} | {
        name for row in rows for name in (row.name, row.tokens)
    }
    if unknown := sorted(tensors.keys() - known):
        raise DynexportError(f"{path}: {unknown[0]:.80}: expected rows of this bundle only; convert again")
    return {
        row.name: (row.case(_tokens(path, row, tensors)), _answer(path, row, tensors, manifest))
        for row in rows
        if row.name in tensors
    }


def _tokens(path: Path, row: GoldenRow, tensors: dict[str, np.ndarray]) -> np.ndarray:
    tokens = tensors.get(row.tokens, np.zeros(0, np.int64))
    _check_shape(path, row.tokens, tokens, (row.length,))
    return tokens


def _answer(path: Path, row: GoldenRow, tensors: dict[str, np.ndarray], manifest: Manifest) -> Answer:
    logits = tensors[row.name]
    _check_shape(path, row.name, logits, (len(row.positions), manifest.model.vocab_size))
    kind = None if manifest.routing is None else _ROUTES[manifest.routing.kind]
    if kind is None:
        return Answer(logits)
    count = DecisionReader(manifest).rows
    shapes = {"overflow": (count,), "depth": (row.length,)}
    parts = {part: tensors.get(f"{row.name}.{part}", np.zeros(0)) for part in _parts(kind)}
    for part, values in parts.items():
        _check_shape(path, f"{row.name}.{part}", values, shapes.get(part, (count, row.length)))
    return Answer(logits, kind(**parts))


def _check_shape(path: Path, name: str, values: np.ndarray, expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise DynexportError(
            f"{path}: {name}: expected the shape {list(expected)} for this bundle, found "
            f"{list(values.shape)}; convert again"
        )


def _parts(kind: type[RowRoutes | RowPaths]) -> list[str]:
    """Return the names of a row's routing tensors."""
    return [part.name for part in dataclasses.fields(kind)]


def _sequence(checkpoint: Checkpoint, manifest: Manifest, length: int) -> np.ndarray:
    """Return token ids int64 [length]: of a text if there is a tokenizer, otherwise random."""
    vocabulary = manifest.model.vocab_size
    if "tokenizer.json" in checkpoint.files:
        encoded = Text.from_files(checkpoint.files).encode(_TEXT)
        if len(encoded) >= _LENGTH and max(encoded) < vocabulary:
            return varied(encoded, length)
    return np.random.default_rng(0).integers(0, vocabulary, length)


def varied(text: list[int], length: int) -> np.ndarray:
    """Return token ids int64 [length]: a text, continued by its shuffled pieces where it is too short.

    With a text that is simply repeated, attention that looks too far back would find the same tokens and stay unseen.
    """
    random = np.random.default_rng(0)
    found = list(text)
    pieces = [text[start : start + _TOGETHER] for start in range(0, len(text), _TOGETHER)]
    while len(found) < length:
        for place in random.permutation(len(pieces)):
            found += pieces[place]
    return np.asarray(found[:length], np.int64)
