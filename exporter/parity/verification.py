"""``dynexport verify``: run the parity checks, judge them, find the first layer that diverges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynexport.exporter.checkpoint.sizes import check_sizes
from dynexport.exporter.families import read_architecture
from dynexport.exporter.parity import ladder
from dynexport.exporter.parity.arithmetic import as_arithmetic, exact_executor, rounding
from dynexport.exporter.parity.bisect import find_departure
from dynexport.exporter.parity.cases import Prompt
from dynexport.exporter.parity.comparison import Measurement
from dynexport.exporter.parity.entries import StoredEntries
from dynexport.exporter.parity.expected import Scope, expected_checks, missing
from dynexport.exporter.parity.golden import golden_reference, golden_rows, read_golden, varied
from dynexport.exporter.parity.reach import (
    BUDGET,
    full_row,
    long_row,
    not_reached,
    row_limit,
)
from dynexport.exporter.parity.report import Check, Report
from dynexport.exporter.parity.rounded import rounded_oracle, rounded_weights
from dynexport.exporter.parity.thresholds import limits_of
from dynexport.exporter.reference import Oracle
from dynexport.exporter.reference.int8_caches import read_scales
from dynexport.exporter.reference.loading import fits_in_memory
from dynexport.exporter.reference.rounding import has_rounded_caches, is_rounded
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import strategies
from dynexport.exporter.strategies.importing import open_imported
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind, checked_list
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import GOLDEN, Depth
from dynexport.runtime.bundle.text_files import TOKENIZER_FILE
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.text.text import Text

_TEXT = (
    "A lighthouse keeper writes down what the sea does, hour by hour, and nobody reads it. On the third of March the "
    "wind turned north; two boats came in late, one with a broken mast. The keeper's daughter learned to read from "
    "those books, so the first words she knew were fog, swell and lantern. Years afterwards, teaching in a town far "
    "from any water, she still began each lesson by asking the children what the sky had done overnight."
)
# No bundle is specialised for a length. Odd lengths test the edges of kernel tiles, 64 tests whole tiles.
_LENGTHS = (2, 5, 17, 1, 64)
# Number of prompts, from the first on, that are continued: a batch of different lengths.
_GENERATED = 3


def verify(
    bundle: Bundle | str | Path,
    against: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 32,
    long: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Check that a bundle computes what PyTorch computes.

    Args:
        bundle: an opened bundle, or its directory.
        against: the model for PyTorch, as for ``convert``; None uses the bundle's golden vectors as the reference.
        adapter: the adapter that ``convert`` merged into it; None without one.
        backend: what runs the graphs.
        threads: intra-op threads of the engine; None means one per core.
        prompts: rows of token ids; None uses a text, or random token ids for a bundle without tokenizer.
        new_tokens: tokens to generate per prompt and ratio, at least 1.
        long: run a row up to the end of the context at any cost; only with ``against``.
        progress: called with the name of each completed check.

    Returns:
        The report; ``passed`` is False if a check failed.

    Raises:
        DynexportError: there is no reference, the model is not the bundle's, or an argument is wrong.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    verification = Verification.prepare(
        bundle,
        against,
        adapter=adapter,
        backend=backend,
        threads=threads,
        prompts=prompts,
        new_tokens=new_tokens,
        long=long,
    )
    manifest = bundle.manifest
    limits = limits_of(manifest.target, manifest.precision, rounded_caches=has_rounded_caches(manifest))
    measured = []
    for measurement in verification.checks():
        measured.append(measurement)
        if progress is not None:
            progress(measurement.name)
    checks = [Check.judged(measurement, limits) for measurement in measured]
    if progress is not None and not all(check.passed for check in checks):
        progress("looking for the first layer whose output diverges")
    oracles = verification.oracles
    departure = find_departure(verification.executor, oracles[-1] if oracles else None, measured, limits)
    return Report.of(
        str(bundle.path),
        None if against is None else str(against),
        bundle.manifest.precision,
        checks,
        departure,
        _not_exercised(bundle, verification.scope),
        oracles[0].loaded_by if oracles else golden_reference(bundle.file(GOLDEN)),
    )


@dataclass(frozen=True)
class Verification:
    """A loaded bundle and its reference.

    Attributes:
        bundle: the bundle.
        executor: runs the bundle.
        oracles: the model in PyTorch, and again as the bundle rounds weights, keys or values; empty for golden vectors.
        scope: inputs of the checks.
        stored: the model that attends to the bundle's own entries; None without rounded caches or for golden vectors.
    """

    bundle: Bundle
    executor: Executor
    oracles: Sequence[Oracle]
    scope: Scope
    stored: StoredEntries | None = None

    @classmethod
    def prepare(
        cls,
        bundle: Bundle,
        against: str | Path | None = None,
        *,
        adapter: str | Path | None = None,
        backend: RunBackend = "onnxruntime",
        threads: int | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        new_tokens: int = 32,
        long: bool = False,
    ) -> Verification:
        """Load the bundle and the reference; arguments and errors are those of ``verify``."""
        checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
        new_tokens = checked_count("new_tokens", new_tokens)
        if long and against is None:
            raise DynexportError("--long: expected with --against, found without; golden vectors have a fixed length")
        rows = _prompts(bundle) if prompts is None else _checked(bundle, prompts)
        scope = _scope(bundle, rows, new_tokens, against=against is not None, budget=math.inf if long else BUDGET)
        executor = Executor(bundle, threads, backend=backend)
        if against is None:
            return cls(bundle, executor, [], scope)
        manifest, weights = bundle.manifest, _weights(bundle, against, adapter)
        oracles, stored = [strategies()[manifest.contract.strategy].oracle(weights, manifest)], None
        if is_rounded(manifest):
            rounded = rounded_weights(weights, bundle.path, manifest)
            oracles.append(rounded_oracle(rounded, bundle.path, manifest))
            if has_rounded_caches(manifest):
                stored = StoredEntries(rounded, read_scales(bundle.path, manifest))
        return cls(bundle, executor, oracles, scope, stored)

    def checks(self) -> Iterator[Measurement]:
        """Yield all checks, simple ones first; then a failed one for each expected check that is missing."""
        measured = []
        for measurement in _climb(self):
            measured.append(measurement)
            yield measurement
        yield from missing(measured, expected_checks(self.bundle.manifest, self.scope))


def _climb(verification: Verification) -> Iterator[Measurement]:
    bundle, oracles = verification.bundle, verification.oracles
    executor, scope = verification.executor, verification.scope
    ratios = [bundle.manifest.full, *(depth for depth in bundle.manifest.depths if depth.ratio != 1)]
    generated = scope.prompts[: scope.generated]
    longest = max(scope.prompts, key=len)
    yield ladder.kept_sets(bundle)
    yield ladder.constants(bundle)
    if not oracles:
        yield from _golden(bundle, executor)
    else:
        yield ladder.rotary_angles(bundle)
        yield from _held_to_pytorch(oracles[0], executor, scope, ratios)
        for rounded in oracles[1:]:
            exact = exact_executor(bundle, executor.threads)
            if verification.stored is None:
                yield from map(as_arithmetic, _held_to_pytorch(rounded, exact, scope, ratios))
            else:
                tokens = [] if scope.long is None else _long_tokens(bundle, scope.long.length)
                yield from verification.stored.checks(exact, scope, ratios, tokens)
            yield from rounding(executor, rounded, scope.prompts[: scope.rows])
    competing = bundle.manifest.limits.compete
    if not competing and not bundle.manifest.limits.whole_prompts:
        yield from ladder.single_steps(executor, longest)
        yield from ladder.chunked_prefill(executor, longest)
    for depth in ratios:
        if not competing:
            yield from ladder.batch_isolation(executor, generated, depth)
            yield ladder.ended_rows(executor, generated, depth)
        other = Executor(bundle, executor.threads, backend=executor.backend)
        yield ladder.ratio_change(executor, other, (longest, scope.prompts[0]), depth)


def _held_to_pytorch(
    oracle: Oracle, executor: Executor, scope: Scope, ratios: Sequence[Depth]
) -> Iterator[Measurement]:
    bundle, prompts = executor.bundle, scope.prompts
    half = max(1, row_limit(bundle.manifest) // 2)
    turns = [prompts[-1][:half], prompts[0][:half]]
    yield from ladder.prompts_alone_and_together(executor, oracle, prompts, scope.rows)
    for depth in ratios:
        yield from ladder.greedy(executor, oracle, prompts[: scope.generated], depth, scope.new_tokens)
        yield from ladder.second_turn(executor, oracle, turns, depth)
    if scope.long is not None:
        yield from ladder.long_rows(executor, oracle, scope.long, _long_tokens(bundle, scope.long.length), ratios)
    if scope.full is not None:
        tokens = _long_tokens(bundle, scope.full.length + 1)
        yield from ladder.full_caches(executor, oracle, scope.full, tokens)


def _checked(bundle: Bundle, prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    """Return a caller's prompts as lists of token ids."""
    rows = checked_list("prompts", prompts, "prompts, each a list of token ids")
    if not rows:
        raise DynexportError("prompts: expected at least one, found none")
    return [checked_ids("prompt", row, bundle.manifest.model.vocab_size).tolist() for row in rows]


def _scope(bundle: Bundle, prompts: Sequence[Prompt], new_tokens: int, *, against: bool, budget: float) -> Scope:
    manifest = bundle.manifest
    rows = 1 if manifest.limits.compete else manifest.limits.rows or len(prompts)
    ratios = 1 + sum(depth.ratio != 1 for depth in manifest.depths)
    passes = 2 if is_rounded(manifest) else 1
    return Scope(
        prompts,
        rows,
        min(rows, _GENERATED, len(prompts)),
        new_tokens,
        against,
        long_row(manifest, ratios * passes, budget) if against else None,
        full_row(manifest, budget) if against else None,
    )


def _not_exercised(bundle: Bundle, scope: Scope) -> tuple[str, ...]:
    """Return what this verification did not reach."""
    manifest = bundle.manifest
    if scope.against:
        shortest = max(map(len, scope.prompts))
        return not_reached(manifest, scope.long, scope.full, shortest)
    return not_reached(manifest, None, None, max((row.length for row in golden_rows(manifest)), default=0))


def _prompts(bundle: Bundle) -> list[Prompt]:
    """Return prompts of several lengths; all but the longest leave half of the context for generated tokens."""
    most = row_limit(bundle.manifest)
    half = max(1, most // 2)
    if bundle.manifest.limits.whole_prompts:  # no chunks
        most = min(most, bundle.manifest.limits.prompt or most)
    lengths = dict.fromkeys([*(min(length, half, most) for length in _LENGTHS[:-1]), min(_LENGTHS[-1], most)])
    ids = np.resize(_tokens(bundle), sum(lengths)).tolist()
    prompts: list[Prompt] = []
    for length in lengths:
        prompts.append(ids[:length])
        del ids[:length]
    return prompts


def _tokens(bundle: Bundle) -> list[int]:
    return _text(bundle) or _random(bundle, sum(_LENGTHS))


def _long_tokens(bundle: Bundle, length: int) -> Prompt:
    text = _text(bundle)
    return varied(text, length).tolist() if text else _random(bundle, length)


def _text(bundle: Bundle) -> list[int]:
    """Return the token ids of a text; empty without a tokenizer for the model."""
    if bundle.file(TOKENIZER_FILE) is None:
        return []
    encoded = Text.of_bundle(bundle).encode(_TEXT)
    return encoded if encoded and max(encoded) < bundle.manifest.model.vocab_size else []


def _random(bundle: Bundle, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, length).tolist()
    return ids


def _golden(bundle: Bundle, executor: Executor) -> Iterator[Measurement]:
    path = bundle.file(GOLDEN)
    if path is None:
        raise DynexportError(
            f"{bundle.path}: expected golden vectors to verify with, found none; name the model with --against, "
            "or convert it where torch is installed"
        )
    there = read_golden(path, bundle.manifest)
    rows = golden_rows(bundle.manifest)
    exact = exact_executor(bundle, executor.threads) if any(row.dequantised for row in rows) else executor
    for row in rows:
        yield from ladder.golden_row(exact if row.dequantised else executor, row, there.get(row.name))


def _weights(bundle: Bundle, against: str | Path, adapter: str | Path | None) -> Weights:
    """Return the model in PyTorch; raise DynexportError if it is not the bundle's."""
    manifest = bundle.manifest
    if (adapter is None) != (manifest.source.adapter is None):
        told = "none" if manifest.source.adapter is None else f"{manifest.source.adapter:.120}, merged by convert"
        raise DynexportError(
            f"{bundle.path}: --adapter: expected that of the bundle ({told}), found {adapter or 'none'}; name the same"
        )
    checkpoint = open_imported(against, manifest.source.importer, adapter=adapter)
    check_sizes(checkpoint)
    architecture = strategies()[manifest.contract.strategy].architecture(
        manifest.contract, read_architecture(checkpoint.config)
    )
    for name in ("layers", "hidden_size", "vocab_size"):
        expected, found = getattr(manifest.model, name), getattr(architecture, name)
        if expected != found:
            raise DynexportError(
                f"{checkpoint.source}: {name}: expected {expected} as in {bundle.path}, found {found}; "
                "name the model that the bundle was made from"
            )
    streaming = not fits_in_memory(manifest.model.parameters)
    return Weights(checkpoint, streaming=streaming, max_length=manifest.model.max_length)
