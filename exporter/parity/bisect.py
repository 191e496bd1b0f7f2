"""Which layer is the first whose output, or whose decision, departs from the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynexport.exporter.parity.cases import replay
from dynexport.exporter.parity.ladder import Measurement, path_through
from dynexport.exporter.parity.metrics import FloatArray, Metrics, number, relative_error
from dynexport.exporter.parity.probe import EMBEDDING, PathProbe, ProbeDecoder
from dynexport.exporter.parity.report import Check, Departure, Place
from dynexport.exporter.parity.thresholds import ROUTES, PrecisionLimits, RouteLimits, wrong_flip
from dynexport.exporter.reference import Case, Oracle
from dynexport.runtime.bundle.contract import Mod, Radial
from dynexport.runtime.bundle.manifest import Manifest, Role
from dynexport.runtime.execution.decoders import AnyDecoder

# Of a row, so many tokens are sent through every layer of a pool in turn.
_TOKENS_OF_A_POOL = 16


def find_departure(
    decoder: AnyDecoder, oracle: Oracle | None, measured: Sequence[Measurement], limits: PrecisionLimits
) -> Departure | None:
    """Where the first failed check goes astray; None where none failed, or nothing tells.

    Hidden states need PyTorch, and graphs that ONNX Runtime runs with further outputs; decisions come with every check.
    """
    failed = [m for m in measured if not Check.judged(m, limits).passed]
    decided = next((m for m in failed if m.kind in ROUTES and _places(m.metrics, limits.routes)), None)
    logits = next((m for m in failed if m.cases), None)
    if logits is not None and oracle is not None and decoder.backend == "onnxruntime":
        errors = _hidden_state_errors(decoder, oracle, logits)
        if errors:
            limit = limits.of(logits.kind, skipped=logits.skipped).layer
            first = first_departure(errors, limit)
            # With every layer right where tokens are sent to it, it is the router that sends them elsewhere.
            if first == "head" and decided is not None and isinstance(decoder.manifest.contract, Radial):
                first = "router"
            return Departure(check=logits.name, first=first, limit=limit, errors=dict(errors))
    return None if decided is None else _decision_departure(decoder.manifest, decided, limits.routes)


def errors_by_layer(
    decoder: ProbeDecoder, oracle: Oracle, cases: Sequence[Case], at: Sequence[int] = ()
) -> dict[str, float]:
    """How far hidden states are from the reference's, after the embedding and after every layer.

    Args:
        decoder: nothing has run on it.
        cases: run as one batch, as the check ran them that failed; routed layers as the reference routes them.
        at: positions whose logits are computed along; empty: all.

    Returns:
        The largest relative error of a token's hidden state, by "embedding" and the layers' numbers, in order.
    """
    told = [answer.routes.decisions for answer in oracle.answers(cases, at=at) if answer.routes is not None]
    replay(decoder, cases, forced=told or None, at=at)
    expected = oracle.hidden_states(cases)
    return {
        name: max(
            relative_error(expected[row][place], _row(decoder.calls, name, row, case)) for row, case in enumerate(cases)
        )
        for place, name in enumerate(decoder.calls[0])
    }


def errors_of_pool(decoder: PathProbe, oracle: Oracle, tokens: Sequence[int]) -> dict[str, float]:
    """The same for a pool of layers, each by itself: all tokens are sent there in the first step.

    Args:
        tokens: of one row.
    """
    contract, layers = decoder.contract, decoder.manifest.model.layers
    errors: dict[str, float] = {}
    for layer in range(layers):
        path = np.repeat(path_through(contract, layers, layer)[:, None], len(tokens), axis=1)
        case = Case(tuple(tokens), ((0, len(tokens)),), decoder.bundle.speedup(1), path)
        embedded, after = oracle.hidden_states([case])[0][:2]
        decoder.shown.clear()
        replay(decoder, [case], at=[len(tokens) - 1])
        parts: list[tuple[str, Role, FloatArray]] = [
            (EMBEDDING, "embedding", embedded),
            (str(layer), "after_attention", after),
        ]
        for name, role, expected in parts:
            found = decoder.shown[role]
            errors[name] = max(errors.get(name, 0.0), relative_error(expected[: len(found)], found))
    return errors


def first_departure(errors: Mapping[str, float], limit: float) -> Place:
    """Where the first error is beyond the limit; "head" when none is, for the logits are wrong all the same."""
    for name, error in errors.items():
        if not error <= limit:
            return "embedding" if name == EMBEDDING else int(name)
    return "head"


def _hidden_state_errors(decoder: AnyDecoder, oracle: Oracle, failed: Measurement) -> dict[str, float]:
    """By layer; empty for graphs that show no layer by itself."""
    bundle, roles = decoder.bundle, {graph.role for graph in decoder.manifest.graphs}
    if roles == {"step"}:
        return errors_by_layer(ProbeDecoder(bundle, decoder.threads), oracle, failed.cases, failed.at)
    if "after_attention" in roles:
        return errors_of_pool(PathProbe(bundle, decoder.threads), oracle, failed.cases[0].tokens[:_TOKENS_OF_A_POOL])
    return {}


def _decision_departure(manifest: Manifest, failed: Measurement, limits: RouteLimits) -> Departure:
    """The first routed layer with a decision that is no near-tie, or the router of paths."""
    contract, places = manifest.contract, _places(failed.metrics, limits)
    names = {place: str(contract.routed_layers[place] if isinstance(contract, Mod) else place) for place in places}
    first: Place = int(names[min(places)]) if isinstance(contract, Mod) else "router"
    return Departure(
        check=failed.name,
        first=first,
        of="decisions",
        limit=limits.near_tie(number(failed.metrics["mean_margin"])),
        errors={names[place]: places[place] for place in sorted(places)},
    )


def _places(metrics: Metrics, limits: RouteLimits) -> dict[int, float]:
    """Layers or steps whose decisions are wrong -> the largest margin among them; 0 where only overflow differs."""
    flips, margins, differs = (metrics.get(name) for name in ("flips", "flip_margins", "overflow_differs"))
    found: dict[int, float] = (
        {place: 0.0 for place in differs if isinstance(place, int)} if isinstance(differs, list) else {}
    )
    if isinstance(flips, list) and isinstance(margins, list):
        for flip, margin in zip(flips, margins, strict=True):
            if isinstance(flip, list) and wrong_flip(metrics, margin, limits):
                found[flip[1]] = max(found.get(flip[1], 0.0), number(margin))
    return found


def _row(calls: Sequence[Mapping[str, FloatArray]], name: str, row: int, case: Case) -> FloatArray:
    """One row's hidden states over all calls, without the padding of its prompt: float32 [length, hidden]."""
    first, *later = (call[name][row] for call in calls)
    return np.concatenate([first[: case.prompted[0][1]], *later])
