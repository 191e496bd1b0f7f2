"""TensorRT's graphs, run by ONNX Runtime: every family and strategy against PyTorch, in every precision it can run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import dynexport
from tiny_models import EXEMPLARS, FAMILIES, LAYERS, random_rows, save_routed_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.executor import Executor

pytest.importorskip("transformers")

# float32 on both sides, added up in another order: at most 3e-5 is measured.
TOLERANCE = 1e-4
CONTEXT, VARIED = 48, (1, 2, 9, 23)
KEEP = (0, 3)
# Between them: windows and ALiBi in routed layers, compact positions, top-k prompts, full caches, both gates.
ROUTED: dict[str, dict[str, Any]] = {
    "plain": {"routed_layers": [1, 3]},
    "compact": {
        "routed_layers": [0, 2],
        "router_input": "normed",
        "gate": "sigmoid",
        "combine": "replace",
        "decision": {"rule": "predictor"},
        "positions": "compact",
    },
    "topk": {
        "routed_layers": [1, 3],
        "capacity": 0.4,
        "rounding": "ceil",
        "prefill": "topk",
        "cache": {"capacity": 0.25},
    },
}
# Largest error of logits in standard deviations: float16 throughout; weights of 8 bits; of random models 4 bits leave
# little, so that only the sign of life is looked for.
PRECISIONS = {"fp16": 0.05, "int8": 0.6, "int4": 8.0}
Convert = Callable[..., Executor]


@pytest.fixture(scope="module")
def routed_model(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def save(family: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-routed") / "model"
        save_routed_model(directory, saved_model(family))
        return directory

    return save


@pytest.fixture
def executor(tmp_path: Path) -> Convert:
    def make(model: Path, **options: Any) -> Executor:
        bundle = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        convert(model, bundle, target="tensorrt", max_length=CONTEXT, golden=False, **options)
        return Executor(Bundle.open(bundle), threads=1)

    return make


def talk(run: Executor, prompts: list[list[int]], generated: list[list[int]], second: list[list[int]]) -> np.ndarray:
    """Prompts in a batch, generated tokens, further prompts: the logits of all tokens, row after row."""
    state = run.full_cache(len(prompts), CONTEXT)
    rows = [[part] for part in run.prefill(state, prompts, all_logits=True)]
    (speedup, *_) = (*run.manifest.depths, run.bundle.depth(1))
    for tokens in zip(*generated, strict=True):
        for row, logits in zip(rows, run.step(state, tokens, speedup), strict=True):
            row.append(logits[None])
    for row, logits in zip(rows, run.prefill(state, second, all_logits=True), strict=True):
        row.append(logits)
    return np.concatenate([np.concatenate(row) for row in rows])


@pytest.mark.parametrize(
    ("family", "strategy"),
    [(family, "unified-skip") for family in FAMILIES] + [(family, "dense") for family in EXEMPLARS],
)
def test_layers_run_or_are_skipped(
    family: str, strategy: str, executor: Convert, saved_model: Callable[[str], Path]
) -> None:
    """After the skipping of a second turn, caches of skipped layers have fewer entries than there are tokens."""
    keep = KEEP if strategy == "unified-skip" else None
    run = executor(saved_model(family), strategy=strategy, keep=keep)
    parts = random_rows(*VARIED), random_rows(*[3] * 4, seed=4), random_rows(5, 1, 4, 2, seed=5)
    rows = [[token for part in row for token in part] for row in zip(*parts, strict=True)]
    runs = [
        np.concatenate(
            [
                unified_skip_runs(len(prompt), len(prompt) + 3, keep or range(LAYERS), LAYERS),
                np.ones((LAYERS, len(second)), bool),
            ],
            axis=1,
        )
        for prompt, _, second in zip(*parts, strict=True)
    ]
    expected = np.concatenate(Reference.from_checkpoint(open_checkpoint(saved_model(family))).logits(rows, runs))
    assert np.abs(talk(run, *parts) - expected).max() / expected.std() < TOLERANCE


@pytest.mark.parametrize("family", EXEMPLARS)
def test_routed_layers(
    family: str, routed_model: Callable[[str], Path], saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Padded prompts; decoding padded, and in a graph with conditions: each the same as PyTorch. Of every second family
    the static form calls our operators."""
    number = EXEMPLARS.index(family)
    fields = list(ROUTED.values())[number % len(ROUTED)]
    checkpoint = open_checkpoint(routed_model(family))
    contract = parse_contract({**checkpoint.config["dynexport"], **fields}, "test")
    reference = ModReference.from_checkpoint(checkpoint, contract=contract, max_length=CONTEXT)
    parts = random_rows(*VARIED), random_rows(*[3] * 4, seed=4), random_rows(5, 1, 4, 2, seed=5)
    rows = [[token for part in row for token in part] for row in zip(*parts, strict=True)]
    prompted = [[(0, len(p)), (len(p) + 3, len(p) + 3 + len(s))] for p, _, s in zip(*parts, strict=True)]
    logits, _ = reference.routed_logits(rows, prompted)
    expected = np.concatenate(logits)
    for static in (True, False):
        bundle = tmp_path / str(static)
        convert(
            routed_model(family), bundle, target="tensorrt", fields=fields, static=static, max_length=CONTEXT,
            golden=False, plugins=static and number % 2 == 1,
        )  # fmt: skip
        run = Executor(Bundle.open(bundle), threads=1)
        assert [graph.name for graph in run.manifest.graphs] == ["model"] + ([] if static else ["decode"])
        assert np.abs(talk(run, *parts) - expected).max() / expected.std() < TOLERANCE, static


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(family: str, precision: str, executor: Convert, routed_model: Callable[[str], Path]) -> None:
    """Decisions are those of fp32 where rounding leaves them; so they are forced."""
    found = {}
    for name in ("fp32", precision):
        run = executor(routed_model(family), precision=name, fields={"routed_layers": [1, 3]})
        kind = {spec.dtype for spec in run.manifest.graphs[0].inputs if spec.name.endswith(".key")}
        assert kind == {"float" if name == "fp32" else "float16"}
        state, prompts = run.full_cache(3, CONTEXT), random_rows(3, 7, 12)
        forced = [np.ones((2, len(prompt)), bool) for prompt in prompts]
        logits = run.prefill(state, prompts, all_logits=True, forced=forced)
        last = run.step(state, [1, 2, 3], run.bundle.depth(1), forced=np.ones((2, 3), bool))
        found[name] = np.concatenate([*logits, last])
        assert found[name].dtype == np.float32
    assert np.abs(found[precision] - found["fp32"]).max() / found["fp32"].std() < PRECISIONS[precision]


def test_caches_are_updated_in_place(executor: Convert, saved_model: Callable[[str], Path]) -> None:
    """Nothing of another row, of earlier entries or of slots that are not reached is written."""
    run = executor(saved_model("mistral"), strategy="unified-skip", keep=KEEP)
    state = run.full_cache(2, 20)
    assert {buffer.shape[-2] for name, buffer in state.buffers.items() if name.endswith("key")} == {CONTEXT}
    run.prefill(state, random_rows(4, 7))
    before = {name: buffer.copy() for name, buffer in state.buffers.items()}
    run.step(state, [1, 2], run.manifest.depths[0])
    for name, buffer in state.buffers.items():
        layer, part = name.split(".")
        changed = (buffer != before[name]).reshape(2, -1, CONTEXT, *buffer.shape[3:]).any(axis=1)
        changed = changed if part == "position" else changed.any(axis=-1)
        expected = [[4], [7]] if int(layer) in KEEP else [[], []]
        if part == "position":  # the padding behind the shorter prompt had the same
            expected[0] = []
        assert [np.flatnonzero(row).tolist() for row in changed] == expected, name


def test_long_prompts_go_in_pieces_and_large_batches_are_refused(
    executor: Convert, saved_model: Callable[[str], Path]
) -> None:
    run = executor(saved_model("llama"), strategy="dense", max_batch=2, max_prompt=5)
    whole = executor(saved_model("llama"), strategy="dense")
    prompts = random_rows(17, 3)
    for all_logits in (False, True):
        found, expected = (
            d.prefill(d.full_cache(2, CONTEXT), prompts, all_logits=all_logits) for d in (run, whole)
        )  # fmt: skip
        assert all(np.abs(a - b).max() < TOLERANCE for a, b in zip(found, expected, strict=True))
    with pytest.raises(DynexportError, match=r"batch: expected at most 2 rows, .*found 3; .*--max-batch 3"):
        run.full_cache(3, CONTEXT)


def test_a_ranked_prompt_cannot_be_cut(executor: Convert, routed_model: Callable[[str], Path]) -> None:
    run = executor(routed_model("llama"), fields={"prefill": "topk"}, max_prompt=5)
    assert len(run.prefill(run.full_cache(1, CONTEXT), random_rows(5))) == 1
    with pytest.raises(DynexportError, match=r"prompt: expected at most 5 tokens.*found 6; .*--max-prompt 6"):
        run.prefill(run.full_cache(1, CONTEXT), random_rows(6))


def test_the_commands_take_such_a_bundle(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    options = ("--target", "tensorrt", "--precision", "fp16", "--max-length", CONTEXT, "--strategy", "dense")
    ran = dynexport("convert", saved_model("llama"), "-o", bundle, *options, "--json", "-")
    assert ran.code == 0, ran.err
    for command in (("inspect",), ("verify",), ("run", "--ids", "1,2,3", "--max-new-tokens", "3")):
        ran = dynexport(command[0], bundle, *command[1:], "--json", "-")
        assert ran.code == 0, ran.err


def test_bfloat16_is_for_engines_only(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    convert(saved_model("llama"), bundle, target="tensorrt", precision="bf16", strategy="dense", golden=False)
    ran = dynexport("run", bundle, "--ids", "1,2", "--max-new-tokens", "1")
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert "bfloat16" in ran.err and "dynexport build" in ran.err
