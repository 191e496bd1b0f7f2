"""The model of lm-eval: scores of a local task are PyTorch's, computed here from the checkpoint."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from bundles import environment, skip_bundle  # noqa: F401 - a fixture

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.lm_eval import BundleLM
from dynexport.runtime import Bundle, DynexportError, Model

DOCUMENTS: list[dict[str, Any]] = [
    {"question": "the quick", "choices": [" brown", " fox jumps"], "answer": 0, "text": "the lazy dog"},
    {"question": "a b", "choices": [" c", " d e f"], "answer": 1, "text": "jumps over the lazy dog"},
    {"question": "", "choices": ["over", "the"], "answer": 1, "text": "fox"},
]
STOP, NEW = "e", 6
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


class Judge:
    """PyTorch's model at ratio 2, and the tokenizer."""

    def __init__(self, bundle: Path) -> None:
        self.reference = Reference.from_checkpoint(open_checkpoint(bundle.parent / "model"))
        opened = Bundle.open(bundle)
        self.text, self.tokens = Model(opened, threads=1).text, opened.manifest.tokens
        self.keep = opened.depth(2).keep
        self.first = self.tokens.eos[0] if self.tokens.bos is None else self.tokens.bos

    def logits(self, ids: list[int], prompt: int) -> np.ndarray:
        runs = unified_skip_runs(prompt, len(ids), self.keep, 8)
        return np.asarray(self.reference.logits([ids], [runs])[0], np.float64)

    def pair(self, context: str, continuation: str) -> tuple[float, bool]:
        ids = self.text.encode(context + continuation)
        before = self.text.encode(context) if context else [self.first]
        after = ids[len(before) :] if context else ids
        logits = self.logits([*before, *after], len(before))[len(before) - 1 : -1]
        chosen = logits[np.arange(len(after)), after]
        return float((chosen - np.log(np.exp(logits).sum(-1))).sum()), logits.argmax(-1).tolist() == after

    def answer(self, context: str) -> str:
        prompt, new = self.text.encode(context), []
        while len(new) < NEW and STOP not in self.text.decode(new):
            new.append(int(self.logits([*prompt, *new], len(prompt))[-1].argmax()))
            if new[-1] in self.tokens.eos:
                break
        return self.text.decode(new).partition(STOP)[0]


def samples(folder: Path, task: str) -> list[Any]:
    """The responses of a task, by document."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    found = sorted(map(json.loads, path.read_text().splitlines()), key=lambda each: each["doc_id"])
    return [each["resps"] for each in found]


def test_scores_are_those_of_pytorch(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(f"{json.dumps(each)}\n" for each in DOCUMENTS))
    for name, task in TASKS.items():
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **local, **task}))
    out = tmp_path / "out"
    words = ["--model", "dynexport", "--model_args", f"bundle={skip_bundle},depth=2,threads=1", "--batch_size", "2"]
    words += ["--tasks", ",".join(TASKS), "--include_path", tmp_path, "--log_samples", "--output_path", out]
    ran = subprocess.run(
        [sys.executable, "-m", "dynexport.lm_eval", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")),
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    (results,) = (json.loads(path.read_text())["results"] for path in out.rglob("results_*.json"))
    judge, right = Judge(skip_bundle), []
    for document, found in zip(DOCUMENTS, samples(out, "choice"), strict=True):
        wanted = [judge.pair(document["question"], each) for each in document["choices"]]
        assert [float(each[0][0]) for each in found] == pytest.approx([each for each, _ in wanted], abs=1e-3)
        assert [str(each[0][1]) for each in found] == [str(each) for _, each in wanted]
        right.append(int(np.argmax([each for each, _ in wanted])) == document["answer"])
    assert results["choice"]["acc,none"] == pytest.approx(np.mean(right))
    rolled = [judge.pair("", document["text"])[0] for document in DOCUMENTS]
    assert [float(each[0][0]) for each in samples(out, "rolling")] == pytest.approx(rolled, abs=1e-3)
    size = sum(len(document["text"].encode()) for document in DOCUMENTS)
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(np.exp(-sum(rolled) / size), rel=1e-4)
    wanted_texts = [judge.answer(document["text"]) for document in DOCUMENTS]
    assert [each[0][0] for each in samples(out, "generation")] == wanted_texts


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def short(skip_bundle: Path) -> BundleLM:  # noqa: F811
    """A model with room for 12 tokens."""
    return BundleLM(str(skip_bundle), depth=2, threads=1, max_length=12, batch_size="auto")


def test_what_is_too_long_loses_its_beginning(short: BundleLM, skip_bundle: Path) -> None:  # noqa: F811
    judge, text = Judge(skip_bundle), "the quick brown fox jumps over"
    (found,) = short.loglikelihood(requests((text, " the")), disable_tqdm=True)
    before = len(judge.text.encode(text))
    ids = judge.text.encode(text + " the")
    after = ids[before:]
    kept = ids[before - (12 - len(after) + 1) :]
    logits = judge.logits(kept, len(kept) - len(after))[-len(after) - 1 : -1]
    wanted = (logits[np.arange(len(after)), after] - np.log(np.exp(logits).sum(-1))).sum()
    assert found[0] == pytest.approx(float(wanted), abs=1e-3)
    model = Model(Bundle.open(skip_bundle), threads=1)
    (answer,) = short.generate_until(requests((text, {"until": [], "max_gen_toks": 4})), disable_tqdm=True)
    assert answer == model.generate(judge.text.encode(text)[-8:], max_new_tokens=4, depth=2).text


def test_a_long_text_is_predicted_in_windows(short: BundleLM, skip_bundle: Path) -> None:  # noqa: F811
    judge, text = Judge(skip_bundle), "the quick brown fox"
    ids = judge.text.encode(text)
    # The last window also has as many tokens before it as fit.
    windows = [([judge.first], ids[:12]), (ids[-13 : 12 - len(ids)], ids[12:])]
    total = 0.0
    for before, after in windows:
        logits = judge.logits([*before, *after], len(before))[len(before) - 1 : -1]
        total += float((logits[np.arange(len(after)), after] - np.log(np.exp(logits).sum(-1))).sum())
    assert 13 < len(ids) < 24
    assert short.loglikelihood_rolling(requests((text,)), disable_tqdm=True) == [pytest.approx(total, abs=1e-3)]


def test_a_chat_is_that_of_the_bundle(skip_bundle: Path) -> None:  # noqa: F811
    adapter, chat = BundleLM(str(skip_bundle), threads=1), [{"role": "user", "content": "hi"}]
    prompt = adapter.apply_chat_template(chat)
    (answer,) = adapter.generate_until(requests((prompt, {"until": "\n\n", "max_gen_toks": 5})), disable_tqdm=True)
    assert answer == Model(Bundle.open(skip_bundle), threads=1).chat(chat, max_new_tokens=5, stop=["\n\n"]).text


def test_what_cannot_be_done_is_refused_by_name(short: BundleLM, skip_bundle: Path) -> None:  # noqa: F811
    for options, message in (
        ({"num_beams": 4}, "num_beams: expected one of temperature"),
        ({"max_gen_toks": 12}, "max_gen_toks: expected less than 12, found 12"),
    ):
        with pytest.raises(DynexportError, match=message):
            short.generate_until(requests(("a", options)), disable_tqdm=True)
    with pytest.raises(DynexportError, match="continuation: expected at most 12 tokens"):
        short.loglikelihood(requests(("a", " the quick brown fox")), disable_tqdm=True)
    for fields, message in (
        ({"batch_size": "many"}, "batch_size: expected a number or auto, found many"),
        ({"max_batch_size": 4}, "max_batch_size: expected none, found 4"),
        ({"depth": 7}, "7"),
    ):
        with pytest.raises(DynexportError, match=message):
            BundleLM(str(skip_bundle), **fields)  # type: ignore[arg-type]


def test_lm_eval_finds_the_model_by_its_entry_point() -> None:
    (found,) = entry_points(group="lm_eval.models", name="dynexport")
    assert found.load() is BundleLM


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dynexport.lm_eval")
    with pytest.raises(SystemExit, match=r"error: lm_eval is needed .* pip install 'dynexport\[lm-eval\]'"):
        runpy.run_module("dynexport.lm_eval", run_name="__main__")
    with pytest.raises(DynexportError, match="lm_eval is needed to evaluate a bundle with its tasks"):
        importlib.import_module("dynexport.lm_eval")
