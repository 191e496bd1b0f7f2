"""The C++ sampler chooses the tokens that Python's chooses, with the same log probabilities and the same errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.sampler import RowSampler, choose
from dynexport.runtime.generation.sampling import Sampling

Array = np.ndarray
Run = Callable[..., Any]
STEPS = 6


def _logits(generator: np.random.Generator, rows: int, vocabulary: int) -> Array:
    """Return rows of several shapes: flat, steep, with ties, with excluded tokens."""
    logits = generator.normal(0, 1, (rows, vocabulary)) * generator.choice([0.5, 2.0, 4.0, 8.0], (rows, 1))
    logits = np.where(generator.random((rows, 1)) < 0.25, np.round(logits * 2) / 2, logits)
    excluded = (generator.random((rows, vocabulary)) < 0.3) & (generator.random((rows, 1)) < 0.2)
    return np.where(excluded, -np.inf, logits).astype(np.float32)


def _sampling(generator: np.random.Generator, vocabulary: int, **fixed: Any) -> Sampling:
    """Return random options; about half of them stay at their defaults."""

    def ids(most: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, vocabulary, generator.integers(1, most)).tolist())

    options: dict[str, Any] = {
        "temperature": float(generator.choice([0.0, 0.3, 0.8, 1.0, 1.7])),
        "top_p": float(generator.choice([0.1, 0.5, 0.9, 0.95, 0.999])),
        "top_k": int(generator.choice([1, 5, 50, vocabulary - 1, vocabulary + 9])),
        "min_p": float(generator.choice([0.02, 0.1, 0.5])),
        "typical_p": float(generator.choice([0.2, 0.9])),
        "repetition_penalty": float(generator.choice([0.8, 1.3])),
        "frequency_penalty": float(generator.choice([-0.7, 0.9])),
        "presence_penalty": float(generator.choice([-0.4, 1.1])),
        "logit_bias": {token: float(generator.normal(0, 4)) for token in ids(5)},
        "min_new_tokens": int(generator.integers(1, 4)),
        "suppress_tokens": ids(6),
        "begin_suppress_tokens": ids(6),
        "no_repeat_ngram_size": int(generator.integers(1, 4)),
        "bad_words_ids": (ids(2), ids(4)),
        "logprobs": int(generator.choice([0, 3, 20])),
    }
    kept = {name: value for name, value in options.items() if name == "temperature" or generator.random() < 0.4}
    return Sampling(seed=int(generator.integers(0, 2**63)), **(kept | fixed))


def _python(logits: Array, sampling: Sampling, case: dict[str, Any]) -> Any:
    """Return the choices of the Python sampler, or its error."""
    try:
        row = RowSampler(sampling, seed_index=case["index"], eos=case["eos"], vocabulary=logits.shape[1])
        row.see_prompt(case["prompt"])
        return [choose(logits[place][None], [row])[0] for place in case["rows"]]
    except DynexportError as error:
        return str(error)


def _fields(sampling: Sampling) -> dict[str, Any]:
    default = asdict(Sampling())
    return {name: value for name, value in asdict(sampling).items() if value != default[name]}


def _compared(run: Run, tmp_path: Path, seed: int, vocabulary: int, cases: int, **fixed: Any) -> tuple[int, int]:
    """Run both samplers on random cases. Return the number of tokens, and of cases whose drawn tokens differ."""
    generator = np.random.default_rng(seed)
    logits = _logits(generator, 32, vocabulary)
    logits.tofile(tmp_path / "logits")
    samplings = [_sampling(generator, vocabulary, **fixed) for _ in range(cases)]
    made = [
        {
            "rows": generator.integers(0, len(logits), STEPS).tolist(),
            "prompt": generator.integers(0, min(vocabulary, 40), generator.integers(1, 30)).tolist(),
            "eos": generator.integers(0, vocabulary, 2).tolist(),
            "index": int(generator.integers(0, 9)),
        }
        for _ in samplings
    ]
    given = [case | {"sampling": _fields(sampling)} for case, sampling in zip(made, samplings, strict=True)]
    text = json.dumps({"logits": str(tmp_path / "logits"), "vocab": vocabulary, "cases": given})
    done = run("probe_sample", stdin=text.encode())
    assert done.returncode == 0, done.stderr
    tokens = differ = 0
    for case, sampling, found in zip(made, samplings, json.loads(done.stdout), strict=True):
        expected = _python(logits, sampling, case)
        if isinstance(expected, str):
            assert found == {"error": expected}
            continue
        for ours, theirs in zip(found, expected, strict=True):
            if ours["token"] != theirs.token:
                assert sampling.temperature > 0
                differ += 1
                break
            _check_logprobs(ours, theirs)
            tokens += 1
    return tokens, differ


def _check_logprobs(ours: dict[str, Any], theirs: Any) -> None:
    assert ("logprob" in ours) == (theirs.logprob is not None)
    if theirs.logprob is not None:
        assert ours["logprob"] == pytest.approx(theirs.logprob, abs=1e-6, rel=1e-7)
    assert [token for token, _ in ours["top"]] == [token for token, _ in theirs.top]
    found = [-np.inf if value is None else value for _, value in ours["top"]]  # JSON has no infinity
    assert found == pytest.approx([value for _, value in theirs.top], abs=1e-6, rel=1e-7)


@pytest.mark.parametrize("vocabulary", [1, 7, 100, 1000, 4095])
def test_short_rows_give_the_same_tokens(run: Run, tmp_path: Path, vocabulary: int) -> None:
    tokens, differ = _compared(run, tmp_path, vocabulary, vocabulary, 800)
    assert tokens > 1000 or vocabulary < 100
    assert differ == 0


@pytest.mark.parametrize("fixed", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 40}])
def test_long_rows_with_exact_choice_give_the_same_tokens(run: Run, tmp_path: Path, fixed: dict[str, Any]) -> None:
    tokens, differ = _compared(run, tmp_path, 5, 49_152, 60, **fixed)
    assert tokens > 150
    assert differ == 0


@pytest.mark.parametrize(
    "fixed",
    [
        {},
        {"top_p": 0.95, "min_p": 0.0},
        {"top_p": 0.999, "min_p": 0.05},
        {"top_p": 1.0, "min_p": 0.1},
        {"top_p": 1.0, "min_p": 0.0},
    ],
)
def test_long_rows_rarely_differ_by_the_rounding_of_float32(run: Run, tmp_path: Path, fixed: dict[str, Any]) -> None:
    fixed = {"temperature": 1.0, "top_k": 0, "typical_p": 1.0} | fixed
    tokens, differ = _compared(run, tmp_path, 6, 20_000, 150, **fixed)
    assert tokens > 300
    assert differ <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(run: Run, tmp_path: Path, value: float) -> None:
    logits = np.zeros((1, 3000), np.float32)
    logits[0, 1500 if value > 0 or np.isnan(value) else slice(None)] = value
    logits.tofile(tmp_path / "logits")
    case = {"rows": [0], "prompt": [1], "eos": [], "index": 0, "sampling": {}}
    text = json.dumps({"logits": str(tmp_path / "logits"), "vocab": 3000, "cases": [case]})
    assert json.loads(run("probe_sample", stdin=text.encode()).stdout) == [
        {"error": _python(logits, Sampling(), case)},
    ]


WRONG: list[dict[str, Any]] = [
    {"temperature": -1.0},
    {"temperature": -1e-7},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"typical_p": -0.25},
    {"top_k": -1},
    {"min_p": 1.01},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 1e17},
    {"frequency_penalty": 2.5},
    {"presence_penalty": -3.0},
    {"min_new_tokens": -1},
    {"no_repeat_ngram_size": 1025},
    {"logprobs": 21},
    {"logit_bias": {5: 101.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {100: 1.0}},
    {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    {"suppress_tokens": (1, -3)},
    {"suppress_tokens": (100,)},
    {"begin_suppress_tokens": (5, 100)},
    {"bad_words_ids": ((1,), ())},
    {"bad_words_ids": ((1, 100),)},
    {"bad_words_ids": ((1,),) * 1025},
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_wrong_options_are_refused_with_the_same_words(run: Run, tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "logits").write_bytes(np.zeros(100, np.float32).tobytes())
    case = {"rows": [0], "sampling": fields}
    text = json.dumps({"logits": str(tmp_path / "logits"), "vocab": 100, "cases": [case]})
    with pytest.raises(DynexportError) as refused:
        RowSampler(Sampling(**fields), vocabulary=100)
    assert json.loads(run("probe_sample", stdin=text.encode()).stdout) == [{"error": str(refused.value)}]
