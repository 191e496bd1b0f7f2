"""Search for the first layer whose output or routing decision diverges from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynexport.exporter.parity.cases import replay
from dynexport.exporter.parity.comparison import Measurement
from dynexport.exporter.parity.ladder import path_through
from dynexport.exporter.parity.metrics import Metrics, number, relative_error
from dynexport.exporter.parity.probe import EMBEDDING, HiddenStates, HopStates
from dynexport.exporter.parity.report import Check, Departure, Place
from dynexport.exporter.parity.thresholds import ROUTES, PrecisionLimits, RouteLimits, wrong_flip
from dynexport.exporter.reference import Case, Oracle
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import GraphSet, LayerRouting, Manifest, PathRouting
from dynexport.runtime.engines.engine import Backend
from dynexport.runtime.execution.executor import Executor

# Number of tokens of a row that are sent through every layer of a pool.
_TOKENS_OF_A_POOL = 16


def find_departure(
    executor: Executor, oracle: Oracle | None, measured: Sequence[Measurement], limits: PrecisionLimits
) -> Departure | None:
    """Return where the first failed check diverges; None where no check failed or the place cannot be found.

    Hidden states are compared where PyTorch runs the model and ONNX Runtime runs the graphs, with additional outputs.
    Routing decisions are part of every check's metrics.
    """
    failed = [m for m in measured if not Check.judged(m, limits).passed]
    decided = next((m for m in failed if m.kind in ROUTES and _places(m.metrics, limits.routes)), None)
    logits = next((m for m in failed if m.cases), None)
    if logits is not None and oracle is not None and executor.backend == "onnxruntime":
        errors = _hidden_state_errors(executor, oracle, logits)
        if errors:
            limit = limits.of(logits.kind, skipped=logits.skipped).layer
            first = first_departure(errors, limit)
            # Every layer is right for given routes, so the router causes the difference.
            if first == "head" and decided is not None and isinstance(executor.manifest.routing, PathRouting):
                first = "router"
            return Departure(check=logits.name, first=first, limit=limit, errors=dict(errors))
    return None if decided is None else _decision_departure(executor.manifest, decided, limits.routes)


def errors_by_layer(
    bundle: Bundle, threads: int | None, oracle: Oracle, cases: Sequence[Case], at: Sequence[int] = ()
) -> dict[str, float]:
    """Return the relative error of hidden states after the embedding and after every layer.

    Args:
        bundle: the bundle to run.
        threads: as for ``Executor``.
        oracle: the model in PyTorch.
        cases: the failed check's rows; they run as one batch, with the reference's routes.
        at: positions whose logits are computed; empty means all.

    Returns:
        The largest relative error of a token, by "embedding" and the layers' numbers, in order.
    """
    told = [answer.routes.decisions for answer in oracle.answers(cases, at=at) if answer.routes is not None]
    probe = HiddenStates(bundle, threads)
    replay(Executor(bundle, threads, wrap=lambda _: probe), cases, forced=told or None, at=at)
    expected = oracle.hidden_states(cases)
    return {
        name: max(
            relative_error(expected[row][place], probe.of_row(name, row, len(case.tokens)))
            for row, case in enumerate(cases)
        )
        for place, name in enumerate(probe.calls[0].states)
    }


def errors_of_pool(
    bundle: Bundle, threads: int | None, found: GraphSet, oracle: Oracle, tokens: Sequence[int]
) -> dict[str, float]:
    """Return the relative error of hidden states after the embedding and after each layer of a pool.

    Each layer is tested alone: all tokens are sent to it in their first hop.

    Args:
        bundle: the bundle to run.
        threads: as for ``Executor``.
        found: graphs of the prompt's program.
        oracle: the model in PyTorch.
        tokens: token ids of one row.

    Returns:
        The largest relative error of a token, by "embedding" and the layers' numbers, in order.
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
    """Return the first place whose error exceeds the limit; "head" if none does, as the logits are wrong."""
    for name, error in errors.items():
        if not error <= limit:
            return "embedding" if name == EMBEDDING else int(name)
    return "head"


def _hidden_state_errors(executor: Executor, oracle: Oracle, failed: Measurement) -> dict[str, float]:
    """Return the errors by layer; empty for a single graph of paths, which has no output per layer."""
    bundle, threads = executor.bundle, executor.threads
    found = bundle.manifest.program("prompt", failed.cases[0].depth).set
    if found is not None:
        return errors_of_pool(bundle, threads, found, oracle, failed.cases[0].tokens[:_TOKENS_OF_A_POOL])
    if isinstance(bundle.manifest.routing, PathRouting):
        return {}
    return errors_by_layer(bundle, threads, oracle, failed.cases, failed.at)


def _decision_departure(manifest: Manifest, failed: Measurement, limits: RouteLimits) -> Departure:
    """Return the first routed layer with a wrong decision, or the router of paths."""
    routing, places = manifest.routing, _places(failed.metrics, limits)
    by_layer = isinstance(routing, LayerRouting)
    names = {place: str(routing.layer_of(place) if isinstance(routing, LayerRouting) else place) for place in places}
    first: Place = int(names[min(places)]) if by_layer else "router"
    return Departure(
        check=failed.name,
        first=first,
        of="decisions",
        limit=limits.near_tie(number(failed.metrics["mean_margin"])),
        errors={names[place]: places[place] for place in sorted(places)},
    )


def _places(metrics: Metrics, limits: RouteLimits) -> dict[int, float]:
    """Return routed layer or hop -> largest margin of its wrong decisions; 0 where only the overflow differs."""
    flips, margins, differs = (metrics.get(name) for name in ("flips", "flip_margins", "overflow_differs"))
    found: dict[int, float] = (
        {place: 0.0 for place in differs if isinstance(place, int)} if isinstance(differs, list) else {}
    )
    if isinstance(flips, list) and isinstance(margins, list):
        for flip, margin in zip(flips, margins, strict=True):
            if isinstance(flip, list) and wrong_flip(metrics, margin, limits):
                found[flip[1]] = max(found.get(flip[1], 0.0), number(margin))
    return found
