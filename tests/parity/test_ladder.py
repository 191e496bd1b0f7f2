"""The whole ladder: right bundles pass, every check can fail, and a failure is traced to the layer that caused it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynexport.exporter.parity import Report, verify
from dynexport.exporter.parity.thresholds import LIMITS
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import GOLDEN, File
from dynexport.runtime.execution import executor
from dynexport.runtime.execution.batch import Call
from dynexport.runtime.execution.calls import call_of
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.execution.whole_step import WholeStep

pytest.importorskip("transformers")

ModelOf = Callable[[str], Path]
BundleOf = Callable[..., Bundle]


def failed(report: Report) -> set[str]:
    """Names of failed checks, without what they were tried with."""
    return {check.name.split("/")[0] for check in report.checks if not check.passed}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"strategy": "dense"}),
        ("llama", {}),
        ("llama", {"static": True}),
        ("llama", {"precision": "int8"}),
        ("mistral", {}),
    ],
)
def test_right_bundle_passes(
    family: str, options: dict[str, Any], saved_model: ModelOf, convert_once: BundleOf
) -> None:
    bundle = convert_once(family, **options)
    seen: list[str] = []
    report = verify(bundle, saved_model(family), new_tokens=12, threads=1, progress=seen.append)
    assert report.passed and not failed(report)
    assert seen == [check.name for check in report.checks]
    assert report.first_departing_layer is None
    kinds = {name.split("/")[0] for name in seen}
    assert kinds >= {"kept_sets", "prompt", "greedy", "second_turn", "single_steps", "chunked_prefill"}
    assert kinds >= {"batch_isolation", "neighbours", "ratio_change"}
    if bundle.manifest.precision == "fp32":
        assert report.token_agreement == 1
        assert report.max_abs_logit_error is not None and report.max_abs_logit_error < 1e-4


def test_golden_vectors_suffice(convert_once: BundleOf) -> None:
    report = verify(convert_once(), threads=1)
    assert report.passed
    assert {check.name for check in report.checks} >= {"golden/full/33", "golden/2/33", "neighbours/2", "single_steps"}


@pytest.mark.parametrize(
    ("tensor", "place", "static"),
    [
        ("model.embed_tokens.weight", "embedding", False),
        ("model.layers.0.mlp.down_proj.weight", 0, False),
        ("model.layers.1.self_attn.qkv_proj.weight", 1, True),
        ("model.layers.2.input_layernorm.weight", 2, False),
        ("model.layers.3.self_attn.o_proj.weight", 3, False),
        ("model.norm.weight", "head", False),
        ("lm_head.weight", "head", True),
    ],
)
def test_wrong_weight_is_found(
    tensor: str, place: int | str, static: bool, saved_model: ModelOf, convert_once: BundleOf, damage: Any
) -> None:
    report = verify(damage(convert_once(static=static), tensor), saved_model("llama"), new_tokens=4, threads=1)
    assert not report.passed
    assert report.first_departing_layer == place
    assert report.departure is not None and list(report.departure.errors) == ["embedding", "0", "1", "2", "3"]
    assert not failed(report) & {"kept_sets", "single_steps", "chunked_prefill", "neighbours", "ratio_change"}


def test_wrong_weight_fails_golden_vectors_too(convert_once: BundleOf, damage: Any) -> None:
    report = verify(damage(convert_once(), "model.layers.1.mlp.down_proj.weight"), threads=1)
    assert failed(report) == {"golden"}
    assert report.departure is None


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_layer_that_only_skipping_shows(
    target: str, saved_model: ModelOf, convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that goes wrong in one layer, and only when tokens are fed one by one, is traced to that layer.

    Graphs for TensorRT return the logits of a few tokens per call: prompts run row by row, in chunks.
    """
    step = Executor.step

    def damaged(self: Executor, cache: KvCache, *args: Any, **options: Any) -> Any:
        cache.buffers["3.key"][:, :, 0] = 9
        return step(self, cache, *args, **options)

    monkeypatch.setattr(Executor, "step", damaged)
    report = verify(convert_once(target=target), saved_model("llama"), new_tokens=4, threads=1)
    assert report.departure is not None
    assert (report.departure.check, report.departure.first) == ("greedy/full", 3)


def test_other_kept_set_fails(convert_once: BundleOf) -> None:
    bundle = convert_once()
    (speedup,) = bundle.manifest.depths
    other = speedup.model_copy(update={"keep": (0, 2)})
    mutant = Bundle(bundle.path, bundle.manifest.model_copy(update={"depths": (other,)}))
    assert failed(verify(mutant, threads=1)) == {"kept_sets", "golden"}


def every_layer(cache: KvCache, _: Any) -> dict[str, Any]:
    return {"layer_active": np.ones(cache.manifest.model.layers, bool)}


def later_positions(cache: KvCache, inputs: dict[str, Any]) -> dict[str, Any]:
    """Off by one for all but the first tokens of a sequence."""
    return {"position_ids": inputs["position_ids"] + (inputs["position_ids"][:, :1] > 0)}


def forgotten_row(cache: KvCache, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every row is taken to be as long as the first."""
    return {
        "cache_lengths": np.ascontiguousarray(
            np.broadcast_to(inputs["cache_lengths"][:, :1], inputs["cache_lengths"].shape)
        )
    }


def scrambled_positions(cache: KvCache, _: Any) -> dict[str, Any]:
    cache.buffers["0.position"][:] = 0
    return {}


@pytest.mark.parametrize(
    ("family", "mutation", "expected"),
    [
        ("llama", every_layer, {"greedy", "second_turn"}),
        ("llama", later_positions, {"greedy", "second_turn", "single_steps", "chunked_prefill"}),
        ("llama", forgotten_row, {"greedy", "batch_isolation"}),
        ("mistral", scrambled_positions, {"greedy", "second_turn", "single_steps", "chunked_prefill"}),
    ],
)
def test_wrong_inputs_fail(
    family: str,
    mutation: Callable[..., dict[str, Any]],
    expected: set[str],
    saved_model: ModelOf,
    convert_once: BundleOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The executor tells the graph something wrong."""
    prepare = WholeStep._inputs

    def mutated(self: WholeStep, cache: KvCache, *args: Any) -> dict[str, Any]:
        inputs = prepare(self, cache, *args)
        return inputs | mutation(cache, inputs)

    monkeypatch.setattr(WholeStep, "_inputs", mutated)
    assert failed(verify(convert_once(family), saved_model(family), new_tokens=8, threads=1)) >= expected


def test_neighbours_that_leak_fail(convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little: far less than rounding may change."""
    step = Executor.step

    def leaking(self: Executor, *args: Any, **options: Any) -> Any:
        logits = step(self, *args, **options)
        return logits + 1e-6 * logits.sum(axis=0)

    monkeypatch.setattr(Executor, "step", leaking)
    assert failed(verify(convert_once(), threads=1)) == {"neighbours"}


def test_padding_that_leaks_fails(
    saved_model: ModelOf, convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a right-padded prompt is taken to be as long as the longest."""

    def padded(*args: Any, **options: Any) -> Call:
        call = call_of(*args, **options)
        return replace(call, counts=np.full_like(call.counts, call.ids.shape[1]))

    monkeypatch.setattr(executor, "call_of", padded)
    assert failed(verify(convert_once(), saved_model("llama"), new_tokens=4, threads=1)) >= {
        "greedy",
        "batch_isolation",
    }


def test_batch_that_is_mixed_up_fails(
    saved_model: ModelOf, convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a prompt's batch is given the first row's logits."""
    prefill = Executor.prefill
    monkeypatch.setattr(
        Executor,
        "prefill",
        lambda self, cache, rows, **others: prefill(self, cache, rows, **others)[:1] * len(rows),
    )
    report = verify(convert_once(), saved_model("llama"), new_tokens=4, threads=1, prompts=[[5, 6], [7, 8]])
    assert {check.name for check in report.checks if not check.passed} >= {"prompt/batch", "greedy/2"}


def test_state_left_by_an_earlier_request_fails(convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def incomplete(self: KvCache, row: int) -> None:
        self.positions[row] = 1
        self.lengths[:, row] = 0

    monkeypatch.setattr(KvCache, "rewind", incomplete)
    assert failed(verify(convert_once(), threads=1)) == {"ratio_change"}


def test_logits_that_are_not_finite_fail(convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Executor.step
    monkeypatch.setattr(
        Executor, "step", lambda self, *args, **options: step(self, *args, **options) * np.float32(np.nan)
    )
    report = verify(convert_once(), threads=1)
    assert failed(report) >= {"golden", "single_steps"}
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["max_abs_logit_error"] is None


def test_report_is_judged_again_after_saving(convert_once: BundleOf) -> None:
    report = verify(convert_once(), threads=1)
    saved = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert saved.keys() >= {"passed", "checks", "max_abs_logit_error", "token_agreement"}
    assert all(check.keys() >= {"name", "passed", "metrics"} for check in saved["checks"])
    read = Report.model_validate(saved)
    assert read == report == read.judged_again(LIMITS["fp32"])
    strict = LIMITS["fp32"].full.__class__(error=(0, 0), mean_kl=0, agreement=1, layer=0)
    limits = LIMITS["fp32"].__class__(full=strict, skipped=strict, consistency=strict, routes=LIMITS["fp32"].routes)
    assert "golden" in failed(read.judged_again(limits))


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from dynexport.exporter.parity import verify
from dynexport.runtime.bundle.bundle import Bundle
for path in sys.argv[1:]:
    report = verify(Bundle.open(path), threads=1)
    print(report.passed, *sorted({check.name.split("/")[0] for check in report.checks if not check.passed}))
"""


def test_golden_vectors_need_no_torch(convert_once: BundleOf, damage: Any) -> None:
    right = convert_once()
    wrong = damage(right, "model.layers.0.mlp.up_proj.weight")
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(right.path), str(wrong.path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["True", "False golden"]


def without_golden(bundle: Bundle) -> Bundle:
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != GOLDEN}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"files": files}))


def test_without_any_reference(convert_once: BundleOf) -> None:
    with pytest.raises(DynexportError, match="--against"):
        verify(without_golden(convert_once()))


def test_other_model_is_refused(saved_model: ModelOf, convert_once: BundleOf) -> None:
    with pytest.raises(DynexportError, match=r"hidden_size: expected 32 as in .*, found 40"):
        verify(convert_once(), saved_model("llama-narrow"))


@pytest.mark.parametrize("arguments", [{"new_tokens": 0}, {"prompts": []}, {"prompts": [[]]}, {"prompts": [[97]]}])
def test_wrong_arguments(arguments: dict[str, Any], convert_once: BundleOf) -> None:
    with pytest.raises(DynexportError, match="expected"):
        verify(convert_once(), **arguments)


def test_prompts_that_fill_the_context(saved_model: ModelOf, convert_once: BundleOf) -> None:
    full = list(range(64))
    assert verify(convert_once(), saved_model("llama"), prompts=[full], threads=1).passed


def test_damaged_golden_vectors(tmp_path: Path, convert_once: BundleOf) -> None:
    bundle = convert_once()
    tensors = load_file(bundle.path / GOLDEN)
    save_file({"tokens": tensors["tokens"], "full.99": tensors["full.33"]}, tmp_path / GOLDEN)
    for name in bundle.manifest.files:
        if name != GOLDEN:
            (tmp_path / name).hardlink_to(bundle.path / name)
    files = bundle.manifest.files | {GOLDEN: File.of(tmp_path / GOLDEN)}
    with pytest.raises(DynexportError, match=r"full\.99"):
        verify(Bundle(tmp_path, bundle.manifest.model_copy(update={"files": files})))
