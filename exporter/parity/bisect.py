"""Which layer is the first whose output, or whose decision, departs from the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynexport.exporter.parity.cases import replay
from dynexport.exporter.parity.comparison import Measurement
from dynexport.exporter.parity.ladder import path_through
from dynexport.exporter.parity.metrics import FloatArray, Metrics, number, relative_error
from dynexport.exporter.parity.probe import EMBEDDING, HiddenStates, HopStates
from dynexport.exporter.parity.report import Check, Departure, Place
from dynexport.exporter.parity.thresholds import ROUTES, PrecisionLimits, RouteLimits, wrong_flip
from dynexport.exporter.reference import Case, Oracle
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import GraphSet, LayerRouting, Manifest, PathRouting
from dynexport.runtime.engines.engine import Backend
from dynexport.runtime.execution.executor import Executor

# Of a row, so many tokens are sent through every layer of a pool in turn.
_TOKENS_OF_A_POOL = 16


def find_departure(
    executor: Executor, oracle: Oracle | None, measured: Sequence[Measurement], limits: PrecisionLimits
) -> Departure | None:
    """Where the first failed check goes astray; None where none failed, or nothing tells.

    Hidden states need PyTorch, and graphs that ONNX Runtime runs with further outputs; decisions come with every check.
    """
    failed = [m for m in measured if not Check.judged(m, limits).passed]
    decided = next((m for m in failed if m.kind in ROUTES and _places(m.metrics, limits.routes)), None)
    logits = next((m for m in failed if m.cases), None)
    if logits is not None and oracle is not None and executor.backend == "onnxruntime":
        errors = _hidden_state_errors(executor, oracle, logits)
        if errors:
            limit = limits.of(logits.kind, skipped=logits.skipped).layer
            first = first_departure(errors, limit)
            # With every layer right where tokens are sent to it, it is the router that sends them elsewhere.
            if first == "head" and decided is not None and isinstance(executor.manifest.routing, PathRouting):
                first = "router"
            return Departure(check=logits.name, first=first, limit=limit, errors=dict(errors))
    return None if decided is None else _decision_departure(executor.manifest, decided, limits.routes)


def errors_by_layer(
    bundle: Bundle, threads: int | None, oracle: Oracle, cases: Sequence[Case], at: Sequence[int] = ()
) -> dict[str, float]:
    """How far hidden states are from the reference's, after the embedding and after every layer.

    Args:
        cases: run as one batch, as the check ran them that failed; routed layers as the reference routes them.
        at: positions whose logits are computed along; empty: all.

    Returns:
        The largest relative error of a token's hidden state, by "embedding" and the layers' numbers, in order.
    """
    told = [answer.routes.decisions for answer in oracle.answers(cases, at=at) if answer.routes is not None]
    probe = HiddenStates(bundle, threads)
    replay(Executor(bundle, threads, wrap=lambda _: probe), cases, forced=told or None, at=at)
    expected = oracle.hidden_states(cases)
    return {
        name: max(
            relative_error(expected[row][place], _row(probe.calls, name, row, case)) for row, case in enumerate(cases)
        )
        for place, name in enumerate(probe.calls[0])
    }


def errors_of_pool(
    bundle: Bundle, threads: int | None, found: GraphSet, oracle: Oracle, tokens: Sequence[int]
) -> dict[str, float]:
    """The same for a pool of layers, each by itself: all tokens are sent there in the first hop.

    Args:
        tokens: of one row.
    """
    routing, layers = bundle.manifest.routing, bundle.manifest.model.layers
    assert isinstance(routing, PathRouting)
    probes: list[HopStates] = []

    def watched(backend: Backend) -> Backend:
        probes.append(HopStates(backend))
        return probes[0]

    executor = Executor(bundle, threads, wrap=watched)
    shown = probes[0].shown
    errors: dict[str, float] = {}
    for layer in range(layers):
        path = np.repeat(path_through(routing, layers, layer)[:, None], len(tokens), axis=1)
        case = Case(tuple(tokens), ((0, len(tokens)),), bundle.manifest.full, path)
        embedded, after = oracle.hidden_states([case])[0][:2]
        shown.clear()
        replay(executor, [case], at=[len(tokens) - 1])
        parts = [(EMBEDDING, found.embedding, embedded), (str(layer), found.after_attention[layer], after)]
        for name, graph, expected in parts:
            states = shown[graph]
            errors[name] = max(errors.get(name, 0.0), relative_error(expected[: len(states)], states))
    return errors


def first_departure(errors: Mapping[str, float], limit: float) -> Place:
    """Where the first error is beyond the limit; "head" when none is, for the logits are wrong all the same."""
    for name, error in errors.items():
        if not error <= limit:
            return "embedding" if name == EMBEDDING else int(name)
    return "head"


def _hidden_state_errors(executor: Executor, oracle: Oracle, failed: Measurement) -> dict[str, float]:
    """By layer; empty for graphs that show no layer by itself."""
    bundle, threads = executor.bundle, executor.threads
    found = bundle.manifest.program("prompt", failed.cases[0].depth).set
    if found is not None:
        return errors_of_pool(bundle, threads, found, oracle, failed.cases[0].tokens[:_TOKENS_OF_A_POOL])
    if isinstance(bundle.manifest.routing, PathRouting):
        return {}
    return errors_by_layer(bundle, threads, oracle, failed.cases, failed.at)


def _decision_departure(manifest: Manifest, failed: Measurement, limits: RouteLimits) -> Departure:
    """The first routed layer with a decision that is no near-tie, or the router of paths."""
    routing, places = manifest.routing, _places(failed.metrics, limits)
    by_layer = isinstance(routing, LayerRouting)
    names = {place: str(routing.layers[place] if isinstance(routing, LayerRouting) else place) for place in places}
    first: Place = int(names[min(places)]) if by_layer else "router"
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
