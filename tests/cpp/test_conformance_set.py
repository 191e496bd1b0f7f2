"""The conformance set in C++: the answers of an independent float64 implementation, not those of dynexport's Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from test_conformance import FORMS, KINDS, NEAR_TIE, TOLERANCE, check_paths, check_routes

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.decisions import DecisionReader, Decisions

Array = np.ndarray
Json = dict[str, Any]


def schedules(answers: list[Json], depth: str, home: Path) -> list[Json]:
    """Each prompt and, step by step, the tokens of its answer: routes recorded, and in the fastest way."""
    made = []
    for place, run in enumerate(answers):
        prompt: Json = {"op": "run", "rows": [0], "tokens": [run["prompt"]], "phase": "prompt", "depths": [depth]}
        recorded = [{**prompt, "tokens": [[token]], "phase": "decode"} for token in run["greedy"]]
        plain = [{"op": "decode", "rows": [0], "tokens": [token], "depths": [depth]} for token in run["greedy"]]
        sizes = {"rows": 1, "tokens": len(run["prompt"]) + len(run["greedy"]), "room": 1}
        for name, steps in (("recorded", recorded), ("plain", plain)):
            operations = [{"op": "acquire", "count": 1}, prompt, *steps]
            made.append({**sizes, "logits": str(home / f"{place}-{name}"), "operations": operations})
    return made


def told_by(results: list[Json], manifest: Manifest) -> list[Decisions]:
    """The decisions of every call, one row each."""
    made = []
    rows, layers = DecisionReader(manifest).rows, manifest.model.layers
    for found in results:
        (told,) = found["found"]["decisions"]
        tokens = told["tokens"]
        made.append(
            Decisions(
                np.array(told["ran"], bool).reshape(layers, tokens),
                np.array(told["choices"], np.int64).reshape(rows, tokens),
                np.array(told["scores"], np.float32).reshape(rows, tokens),
                np.array(told["margins"], np.float32).reshape(rows, tokens),
                np.array(told["overflow"], np.int64),
            )
        )
    return made


@pytest.mark.parametrize(("case", "form"), KINDS, ids=["-".join(filter(None, kind)) for kind in KINDS])
def test_answers(case: str, form: str, run: Callable[..., Any], tmp_path: Path) -> None:
    convert(CONFORMANCE / case, tmp_path / "bundle", **FORMS[form], golden=False)
    manifest, depth = Bundle.open(tmp_path / "bundle").manifest, Bundle.open(tmp_path / "bundle").depth(None).name
    answers = json.loads((CONFORMANCE / case / "expected.json").read_text())["runs"]
    request = {"bundle": str(tmp_path / "bundle"), "schedules": schedules(answers, depth, tmp_path)}
    ran = run("probe_run", stdin=json.dumps(request).encode())
    assert ran.returncode == 0, ran.stderr.decode()
    found = json.loads(ran.stdout)
    for place, answer in enumerate(answers):
        for name, its in zip(("recorded", "plain"), found[2 * place :], strict=False):
            logits = np.fromfile(tmp_path / f"{place}-{name}", np.float32).reshape(-1, manifest.model.vocab_size)
            check_tokens(answer, logits)
            # The last token's step is not in the answer.
            assert sum(its[-2]["state"]["overflow"][0]) == (answer["overflow"] or 0)
        if manifest.routing is not None:
            told = DecisionReader(manifest).joined(told_by(found[2 * place][1:-1], manifest))
            if isinstance(manifest.routing, LayerRouting):
                check_routes(manifest.routing, answer, told)
            if isinstance(manifest.routing, PathRouting):
                check_paths(answer, told)


def check_tokens(answer: Json, logits: Array) -> None:
    assert np.abs(logits[0] - answer["last_prompt_logits"]).max() < TOLERANCE
    for token, margin, values in zip(answer["greedy"], answer["logit_margins"], logits[:-1], strict=True):
        second, best = np.partition(values, -2)[-2:]
        assert best - second == pytest.approx(margin, abs=2 * TOLERANCE)
        assert values.argmax() == token or margin < NEAR_TIE
