"""A C++ worker serves many threads, refuses what it has no room for, and ends all requests when it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import change_tensors, talking_checkpoint
from forms import executor_of

from dynexport.exporter import convert
from dynexport.runtime import DynexportError, load

Run = Callable[..., Any]
THREADS, ROUNDS = 8, 12


def found(run: Run, bundle: Path, **given: Any) -> Any:
    done = run("probe_worker", stdin=json.dumps({"bundle": str(bundle), **given}).encode(), timeout=500)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", ["skip", "mod", "radial-step"])
def test_threads_submit_cancel_and_close(run: Run, form: str) -> None:
    bundle = executor_of(form).bundle.path
    prompts = [[1 + index] * (1 + 3 * index) for index in range(4)] + [list(range(1, 12))]
    told = found(run, bundle, prompts=prompts, threads=THREADS, rounds=ROUNDS)
    idle = {"waiting": 0, "running": 0, "used": 0.0}
    crowd = told["crowd"]
    counts = crowd.pop("counts")
    assert crowd == {"before": "the worker has not started", "problem": "the server stops", "dead": False, **idle}
    assert counts.pop("wrong") == 0
    assert sum(counts.values()) == THREADS * ROUNDS
    assert counts["complete"] > ROUNDS
    assert counts["closed"] > 0
    assert told["drain"] == {"problem": "the server stops", "dead": False, "done": 5, "failed": 0, **idle}
    broken = told["broken"]
    line = f"{bundle}: the worker stopped: no more"
    assert broken == {
        "problem": line,
        "dead": True,
        "lines": [line],
        "refusal": line,
        "failures": broken["failures"],
        **idle,
    }
    assert broken["failures"] in (["failed"], [])


def test_an_engine_that_keeps_failing_makes_the_worker_unready(run: Run, tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "model")

    def overflow(tensors: dict[str, np.ndarray]) -> None:
        """Make the logit of token 7 infinite: above all others after some prompts, below them after others."""
        name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        tensors[name] = tensors[name].copy()
        tensors[name][7] = np.sign(tensors[name][7]) * np.finfo(tensors[name].dtype).max / 2

    change_tensors(tmp_path / "model", overflow)
    convert(tmp_path / "model", tmp_path / "bundle", golden=False)
    model = load(tmp_path / "bundle", threads=1)
    refused: dict[bool, int] = {}
    for token in range(8, 60):
        try:
            model.generate([token], max_new_tokens=6)
            refused[False] = token
        except DynexportError as error:
            assert "expected a finite largest logit" in str(error)
            refused[True] = token
    told = found(run, tmp_path / "bundle", prompts=[[refused[False]]], failing=[refused[True]])
    assert told["problems"] == ["", "", "the last 3 requests failed", ""]
