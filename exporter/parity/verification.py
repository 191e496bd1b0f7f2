"""``dynexport verify``: climb the ladder, judge, and find the layer where a failed check goes astray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.sizes import check_sizes
from dynexport.exporter.families import read_architecture
from dynexport.exporter.parity import ladder
from dynexport.exporter.parity.bisect import errors_by_layer, first_departure
from dynexport.exporter.parity.cases import Prompt
from dynexport.exporter.parity.golden import GoldenRow, read_golden
from dynexport.exporter.parity.probe import ProbeDecoder
from dynexport.exporter.parity.report import Check, Departure, Report
from dynexport.exporter.parity.thresholds import limits_of
from dynexport.exporter.reference import Oracle
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.decoders import AnyDecoder, open_decoder
from dynexport.runtime.engines.opening import RunBackend
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import GOLDEN
from dynexport.runtime.text import TOKENIZER_FILE

_TEXT = (
    "A lighthouse keeper writes down what the sea does, hour by hour, and nobody reads it. On the third of March the "
    "wind turned north; two boats came in late, one with a broken mast. The keeper's daughter learned to read from "
    "those books, so the first words she knew were fog, swell and lantern. Years afterwards, teaching in a town far "
    "from any water, she still began each lesson by asking the children what the sky had done overnight."
)
# Nothing of a bundle is made for a length. Odd ones for the edges of kernels' tiles, 64 for whole tiles.
_LENGTHS = (2, 5, 17, 1, 64)
# After the first of them tokens are generated: a batch of different lengths.
_GENERATED = 3


def verify(
    bundle: Bundle,
    against: str | Path | None = None,
    *,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 32,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Check that a bundle computes what PyTorch computes.

    Args:
        against: the model, as for ``convert``, to be run by PyTorch; None: the bundle's golden vectors stand for it.
        backend, threads: as for ``engine_opener``.
        prompts: rows of token ids; None takes a text's, or random ones where there is no tokenizer.
        new_tokens: generated per prompt and ratio, at least 1.
        progress: called with the name of each check that has been made.

    Raises:
        DynexportError: when nothing stands for the reference, the model is not the bundle's, or a prompt is wrong.
    """
    if new_tokens < 1:
        raise DynexportError(f"new tokens: expected at least 1, found {new_tokens}")
    rows = _prompts(bundle) if prompts is None else list(prompts)
    if not rows:
        raise DynexportError("prompts: expected at least one, found none")
    decoder = open_decoder(bundle, threads, backend=backend)
    oracle = None if against is None else _oracle(bundle, against)
    limits = limits_of(bundle.manifest.target, bundle.manifest.precision)
    measured = []
    for measurement in _climb(bundle, oracle, decoder, rows, new_tokens):
        measured.append(measurement)
        if progress is not None:
            progress(measurement.name)
    checks = [Check.judged(measurement, limits) for measurement in measured]
    departure = None
    failed = [m for m, check in zip(measured, checks, strict=True) if m.kind == "reference" and not check.passed]
    # Of a set of graphs no single one has the hidden states of all layers, and an engine gives no more than it does.
    if failed and oracle is not None and bundle.manifest.graphs[0].role == "step" and backend == "onnxruntime":
        if progress is not None:
            progress("looking for the layer that departs")
        limit = limits.of("reference", skipped=failed[0].skipped).layer
        errors = errors_by_layer(ProbeDecoder(bundle, threads), oracle, failed[0].cases)
        departure = Departure(
            check=failed[0].name, first=first_departure(errors, limit), limit=limit, errors=dict(errors)
        )
    source = None if against is None else str(against)
    return Report.of(str(bundle.path), source, bundle.manifest.precision, checks, departure)


def _climb(
    bundle: Bundle, oracle: Oracle | None, decoder: AnyDecoder, prompts: list[Prompt], new_tokens: int
) -> Iterator[ladder.Measurement]:
    """All checks, the simplest first."""
    ratios = [bundle.speedup(1), *(speedup for speedup in bundle.manifest.speedups if speedup.ratio != 1)]
    rows = bundle.manifest.limit("B") or len(prompts)
    generated = prompts[: min(rows, _GENERATED)]
    longest = max(prompts, key=len)
    half = max(1, bundle.manifest.model.max_length // 2)
    turns = [prompts[-1][:half], prompts[0][:half]]
    yield ladder.kept_sets(bundle)
    if oracle is None:
        for row in _golden(bundle):
            yield from ladder.golden_row(decoder, row)
    else:
        yield from ladder.prompts_alone_and_together(decoder, oracle, prompts, rows)
        for speedup in ratios:
            yield from ladder.greedy(decoder, oracle, generated, speedup, new_tokens)
            yield from ladder.second_turn(decoder, oracle, turns, speedup)
    if not ladder.prompts_compete(bundle):
        yield from ladder.single_steps(decoder, longest)
        yield from ladder.chunked_prefill(decoder, longest)
    for speedup in ratios:
        yield from ladder.batch_isolation(decoder, generated, speedup)
        other = open_decoder(bundle, decoder.threads, backend=decoder.backend)
        yield ladder.ratio_change(decoder, other, (longest, prompts[0]), speedup)


def _prompts(bundle: Bundle) -> list[Prompt]:
    """Prompts of several lengths; all but the longest leave half of the context for what is generated."""
    half, most = max(1, bundle.manifest.model.max_length // 2), bundle.manifest.model.max_length
    if ladder.prompts_compete(bundle):  # they cannot be cut
        most = min(most, bundle.manifest.limit("S") or most)
    lengths = dict.fromkeys([*(min(length, half, most) for length in _LENGTHS[:-1]), min(_LENGTHS[-1], most)])
    ids = np.resize(_tokens(bundle), sum(lengths)).tolist()
    prompts: list[Prompt] = []
    for length in lengths:
        prompts.append(ids[:length])
        del ids[:length]
    return prompts


def _tokens(bundle: Bundle) -> list[int]:
    vocabulary = bundle.manifest.model.vocab_size
    if bundle.file(TOKENIZER_FILE) is not None:
        encoded = bundle.text().encode(_TEXT)
        if encoded and max(encoded) < vocabulary:
            return encoded
    ids: list[int] = np.random.default_rng(1).integers(0, vocabulary, sum(_LENGTHS)).tolist()
    return ids


def _golden(bundle: Bundle) -> list[GoldenRow]:
    path = bundle.file(GOLDEN)
    if path is None:
        raise DynexportError(
            f"{bundle.path}: expected golden vectors to verify with, found none; name the model with --against, "
            "or convert it where torch is installed"
        )
    return read_golden(path, bundle.manifest)


def _oracle(bundle: Bundle, against: str | Path) -> Oracle:
    """The model in PyTorch, when the bundle can have been made from it."""
    manifest = bundle.manifest
    checkpoint = open_checkpoint(against, importer=manifest.source.importer)
    check_sizes(checkpoint)
    architecture = read_architecture(checkpoint.config)
    for name in ("layers", "hidden_size", "vocab_size"):
        expected, found = getattr(manifest.model, name), getattr(architecture, name)
        if expected != found:
            raise DynexportError(
                f"{checkpoint.source}: {name}: expected {expected} as in {bundle.path}, found {found}; "
                "name the model that the bundle was made from"
            )
    # One layer in memory at a time: the engine holds the whole model already.
    return strategies()[manifest.contract.strategy].oracle(checkpoint, manifest, streaming=True)
