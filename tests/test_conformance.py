"""The conformance set: checkpoints of others with the answers of an independent float64 implementation.

Each case holds ``config.json``, ``model.safetensors`` and ``expected.json``. Where the answer's best two tokens are a
near-tie either may be taken; the answer's own token is then forced, so that all that follows is still compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, dynexport

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, Model
from dynexport.runtime.bundle.manifest import LayerRouting, PathRouting
from dynexport.runtime.execution.decisions import Decisions

TOLERANCE = 1e-4
NEAR_TIE = 2e-3
ROUTE_MARGIN = 1e-5
CASES = sorted(path.parent.name for path in CONFORMANCE.glob("*/expected.json"))
# What a lowering is called in names of tests, and how it is asked for.
FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "static": {"static": True},
    "single": {"layer_capacity": 1.0},
    "tensorrt": {"target": "tensorrt"},
    "tensorrt-static": {"target": "tensorrt", "static": True},
    "tensorrt-plugins": {"target": "tensorrt", "plugins": True},
}
# Of those with fixed depths, and of others.
FIXED = ["", "static", "tensorrt"]
FORMS_OF = {
    "dense": ["", "tensorrt"],
    "loop-exit-last": [""],
    "loop-huginn-change": [""],
    "mod": ["", "static", "tensorrt", "tensorrt-static"],
    "radial": ["", "single", "tensorrt", "tensorrt-plugins"],
}
# Whose cache_policy is layer: no graph decodes them with our operators.
BY_LAYER = ("radial-layer", "radial-own-routers")
KINDS = [
    (case, form)
    for case in CASES
    for form in FORMS_OF.get(case, FORMS_OF.get(case.split("-")[0], FIXED))
    if not (form == "tensorrt-plugins" and case in BY_LAYER)
]


@dataclass(frozen=True)
class Case:
    """A converted checkpoint and its answers."""

    path: Path
    bundle: Bundle
    expected: dict[str, Any]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(filter(None, kind)))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, form = request.param
    path = tmp_path_factory.mktemp(name) / "bundle"
    convert(CONFORMANCE / name, path, **FORMS[form], golden=False)
    return Case(path, Bundle.open(path), json.loads((CONFORMANCE / name / "expected.json").read_text()))


def decided(run: dict[str, Any]) -> list[int]:
    """The expected tokens up to the first near-tie, from where on a rounding may change them."""
    near = [i for i, margin in enumerate(run["logit_margins"]) if margin < NEAR_TIE]
    return run["greedy"][: near[0]] if near else run["greedy"]


def test_the_sizes_and_the_kept_set(case: Case) -> None:
    manifest = case.bundle.manifest
    assert manifest.model.max_length == case.expected["max_length"]
    assert [list(speedup.keep) for speedup in manifest.depths] == [case.expected["keep"]] * bool(case.expected["keep"])


def test_logits_and_tokens(case: Case) -> None:
    executor = Model(case.bundle, threads=1).executor
    for run in case.expected["runs"]:
        # Its buffers grow at almost every step.
        cache = executor.full_cache(1, len(run["prompt"]) + len(run["greedy"]), record=True, room=1)
        (logits,) = executor.prefill(cache, [run["prompt"]], depth=case.bundle.depth(None))
        assert np.abs(logits[0] - run["last_prompt_logits"]).max() < TOLERANCE
        for token, margin in zip(run["greedy"], run["logit_margins"], strict=True):
            second, best = np.partition(logits[0], -2)[-2:]
            assert best - second == pytest.approx(margin, abs=2 * TOLERANCE)
            assert logits[0].argmax() == token or margin < NEAR_TIE
            steps = len(cache.logs[0])  # the last token's step is not in the answer
            overflow = cache.overflow.sum()
            logits = executor.step(cache, [token], case.bundle.depth(None))
        assert overflow == (run["overflow"] or 0)
        told = executor.reader.joined(cache.logs[0][:steps])
        if isinstance(case.bundle.manifest.routing, LayerRouting):
            check_routes(case.bundle.manifest.routing, run, told)
        if isinstance(case.bundle.manifest.routing, PathRouting):
            check_paths(run, told)


def check_paths(run: dict[str, Any], told: Decisions) -> None:
    paths, margins = told.choices.T, told.margins.T
    assert len(paths) == len(run["routes"])
    for path, margin, expected in zip(paths, margins, run["routes"], strict=True):
        assert path[path >= 0].tolist() == expected or margin.min() < ROUTE_MARGIN
    assert margins.min() == pytest.approx(run["smallest_route_margin"], abs=ROUTE_MARGIN)


def check_routes(routing: LayerRouting, run: dict[str, Any], told: Decisions) -> None:
    ran, scores, margins = told.ran.T, told.scores.T, told.margins.T
    expected, covered = np.array(run["routes"], bool), list(routing.covered)
    assert ran.shape[0] == len(expected) and np.isfinite(scores).all()
    chosen, near = (np.repeat(part, routing.span, axis=1) for part in (told.choices.T == 1, margins < ROUTE_MARGIN))
    if expected.shape[1] > len(covered):  # of all layers, or of the routed ones
        expected = expected[:, covered]
    assert ((chosen == expected) | near).all()
    assert (ran[:, covered] == (chosen | (routing.skipped_kv == "computed"))).all()
    assert np.delete(ran, covered, axis=1).all()
    assert margins.min() == pytest.approx(run["smallest_route_margin"], abs=ROUTE_MARGIN)


def test_generation_of_all_prompts_together(case: Case) -> None:
    runs = case.expected["runs"]
    done = Model(case.bundle, threads=1).generate([run["prompt"] for run in runs], max_new_tokens=16)
    for run, generation in zip(runs, done, strict=True):
        assert len(generation.ids) == len(run["greedy"])
        assert generation.ids[: len(decided(run))] == decided(run)


def test_the_command_line(case: Case) -> None:
    # A single graph of many nodes takes seconds to load, every time.
    slow = not all(graph.share_memory for graph in case.bundle.manifest.graphs)
    for run in case.expected["runs"][: 1 if slow else None]:
        ids = ",".join(map(str, run["prompt"]))
        ran = dynexport("run", case.path, "--ids", ids, "--max-new-tokens", 16, "--threads", 1, "--json", "-")
        assert ran.code == 0, ran.err
        assert ran.report["ids"][: len(decided(run))] == decided(run)
        assert ran.report["finish_reason"] == "length"
