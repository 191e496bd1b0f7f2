"""int8 KV caches: scales from a text, parity on the stored entries, planted faults, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE, dynexport, error_of, talking_checkpoint
from planting import Edited, Planted

pytest.importorskip("transformers")

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.parity import Report, verify
from dynexport.exporter.parity.entries import FURTHEST
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.execution.executor import Executor

SavedModel = Callable[[str], Path]
TEXT = np.random.default_rng(3).integers(0, 60, 400).tolist()
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "dense fp16": ("dense", {"precision": "fp16"}),
    "skip": ("skip-2x", {}),
    "skip static": ("skip-2x", {"static": True, "precision": "int8"}),
    "mod": ("mod-router", {}),
    "mod static": ("mod-router", {"static": True}),
    "mod topk": ("mod-topk", {}),
    "mod compact": ("mod-compact", {}),
    "early exit": ("early-exit-prompt-exit", {}),
}
# A window, a window with a softcap, ALiBi, half rotated heads with packed weights, normed keys, padded heads.
FAMILIES = ("mistral", "gemma2", "bloom", "mpt", "phi3", "qwen3", "llama-narrow")


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    @cache
    def converted(form: str) -> Bundle:
        case, how = FORMS[form]
        path = tmp_path_factory.mktemp("int8") / "bundle"
        convert(CONFORMANCE / case, path, kv_cache_dtype="int8", kv_cache_text=TEXT, max_length=64, **how)
        return Bundle.open(path)

    return converted


def verified(bundle: Bundle, against: Path | None) -> Report:
    return verify(bundle, against, threads=1, new_tokens=2, prompts=[TEXT[:17], TEXT[20:23], TEXT[30:36]])


def failures(report: Report) -> dict[str, str]:
    return {check.name: "; ".join(check.failures) for check in report.checks if not check.passed}


@pytest.mark.parametrize("form", FORMS)
def test_a_right_bundle_passes(form: str, bundle_of: Callable[[str], Bundle]) -> None:
    """Beside float32 arithmetic, an entry is half a step from PyTorch's: rounding moves it so far and no further."""
    bundle, (case, how) = bundle_of(form), FORMS[form]
    without = verified(bundle, None)
    assert failures(without) == {}
    report = verified(bundle, CONFORMANCE / case)
    assert failures(report) == {}
    checks = {check.name: check.metrics for check in report.checks}
    for depth in ("full", *(depth.name for depth in bundle.manifest.depths)):
        for name in ("steps", "turns", "long"):
            assert 0 < number(checks[f"arithmetic/{name}/{depth}"], "max_abs") < 1e-4
            assert 0.48 < number(checks[f"entries/{name}/{depth}"], "furthest") < 0.501 < FURTHEST
    if how.get("precision") != "int8":
        # Tokens of a prompt attend to each other before keys and values are rounded.
        assert number(checks["rounding/prompt"], "max_abs") < 1e-4
        # For tokens after it, PyTorch's own rounding is nearer to the bundle than the checkpoint is.
        golden = {check.name: check.metrics for check in without.checks}
        found = [name for name in golden if name.startswith("golden/full/") and not name.endswith("/1")]
        assert len(found) > 1
        for name in found:
            assert number(golden[f"rounding/{name}"], "mean_kl") < number(golden[name], "mean_kl") / 2


def number(metrics: Any, name: str) -> float:
    return float(metrics[name])


def test_caches_take_a_quarter_and_the_same_weights(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    done = convert(CONFORMANCE / "skip-2x", tmp_path / "float", max_length=64, golden=False)
    small, large = bundle_of("skip").manifest, done.manifest
    assert large.cost.kv_per_token == 4 * small.cost.kv_per_token
    assert large.files["model.data"] == small.files["model.data"]
    assert dtypes(small) == {"key": "int8", "value": "int8"} and dtypes(large) == {"key": "float", "value": "float"}
    cache = Executor(bundle_of("skip"), threads=1).full_cache(1, 8)
    assert {buffer.dtype for buffer in cache.buffers.values()} == {np.dtype(np.int8)}


def test_a_manifest_names_the_scale_of_int8_entries_and_only_of_these(
    bundle_of: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """By its words alone, the stored integers are the float bundle's keys of a prompt's first token."""
    convert(CONFORMANCE / "dense", tmp_path / "float", max_length=64, golden=False)
    found = []
    for bundle in (bundle_of("dense"), Bundle.open(tmp_path / "float")):
        executor = Executor(bundle, threads=1)
        cache = executor.full_cache(1, 8)
        executor.prefill(cache, [TEXT[:5]], depth=bundle.manifest.full)
        found.append(cache.buffers["0.key"][0, :, :5].astype(np.float32))
    name = bundle_of("dense").manifest.caches[0].parts["key"].scale
    graph = onnx.load(bundle_of("dense").path / "model.onnx", load_external_data=False).graph
    (scale,) = (onnx.numpy_helper.to_array(value) for value in graph.initializer if value.name == name)
    half = scale.shape[-1] // 2  # rotated pairs have one scale, else keys of later positions would be beyond the range
    assert (scale[..., :half] == scale[..., half:]).all() and len(np.unique(scale)) > half // 2
    assert (np.abs(found[0] * scale[0] - found[1]) <= 0.501 * scale[0]).all()
    planted = Planted(bundle_of("dense"), tmp_path / "copy")
    with planted.manifest() as fields:
        fields["caches"][1]["parts"]["value"]["scale"] = None
    with pytest.raises(DynexportError, match="cache 1: value: expected a scale for int8 and only there"):
        planted.bundle()


def test_a_cache_of_floats_is_refused(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    convert(CONFORMANCE / "dense", tmp_path / "float", max_length=64, golden=False)
    floats = Executor(Bundle.open(tmp_path / "float"), threads=1).full_cache(1, 8)
    with pytest.raises(DynexportError, match="found one of another model"):
        Executor(bundle_of("dense"), threads=1).prefill(floats, [TEXT[:5]], depth=bundle_of("dense").manifest.full)


def dtypes(manifest: Manifest) -> dict[str, str]:
    return {name: part.dtype for cache in manifest.caches for name, part in cache.parts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_attention(family: str, saved_model: SavedModel, tmp_path: Path) -> None:
    convert(saved_model(family), tmp_path / "b", kv_cache_dtype="int8", kv_cache_text=TEXT, golden=False)
    report = verified(Bundle.open(tmp_path / "b"), saved_model(family))
    assert failures(report) == {}
    compared = [check.metrics for check in report.checks if check.kind == "arithmetic"]
    assert len(compared) == 3 and all(number(metrics, "max_abs") < 1e-4 for metrics in compared)


def without_mlp(edited: Edited) -> None:
    edited.bypass(edited.behind("hidden_states.1"))


def wrong_angles(edited: Edited) -> None:
    """Exchange the cosines and sines of the second layer's keys."""
    node = edited.nodes("RotaryEmbedding")[3]
    node.input[1], node.input[2] = node.input[2], node.input[1]


def other_scale(name: str, factor: float) -> Callable[[Edited], None]:
    def change(edited: Edited) -> None:
        (scale,) = (value for value in edited.graph.initializer if value.name == f"past_key_values.{name}_scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(factor), scale.name))

    return change


FAULTS: dict[str, tuple[Callable[[Edited], None], str]] = {
    "without an MLP": (without_mlp, "layer 2: expected entries within 0.525 steps"),
    "wrong angles": (wrong_angles, "layer 1: expected entries within 0.525 steps"),
    "too small scales": (
        other_scale("1.value", 1 / 8),
        "layer 1: expected at most 5% of keys and values beyond the ra",
    ),
    "too large scales": (other_scale("1.key", 8), "layer 1: expected a largest key of 32..127, found 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    change, told = FAULTS[fault]
    planted = Planted(bundle_of("dense"), tmp_path / "copy")
    with planted.graph() as edited:
        change(edited)
    found = failures(verified(planted.bundle(), CONFORMANCE / "dense"))
    assert found["entries/steps/full"].startswith(told), found
    if "MLP" in fault:  # wrong keys and scales are those that PyTorch takes
        assert {"arithmetic/steps/full", "arithmetic/turns/full", "arithmetic/long/full"} <= set(found)
        assert any(name.startswith("rounding/golden") for name in failures(verified(planted.bundle(), None)))


def other_widening(edited: Edited) -> None:
    """Widen the second layer's keys by the scales of the third's, for prompts."""
    node = next(n for n in edited.nodes("Mul", "layers.1/") if n.input[1] == "past_key_values.1.key_scale")
    node.input[1] = "past_key_values.2.key_scale"


def rounded_down(edited: Edited) -> None:
    """Round the second layer's keys of prompts down."""
    edited.node("Round", "layers.1/").op_type = "Floor"


def test_faults_of_the_branch_for_prompts_are_named(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Only a second prompt attends to entries that are widened."""
    found = {}
    for change in (other_widening, rounded_down):
        planted = Planted(bundle_of("dense"), tmp_path / change.__name__)
        with planted.graph() as edited:
            change(edited)
        found[change.__name__] = failures(verified(planted.bundle(), CONFORMANCE / "dense"))
    assert "arithmetic/turns/full" in found["other_widening"]
    assert not {"arithmetic/steps/full", "entries/steps/full"} & set(found["other_widening"])
    assert found["rounded_down"]["entries/steps/full"].startswith("layer 1: expected entries within 0.525 steps")


@pytest.mark.parametrize("form", ("dense", "skip", "mod", "mod static", "early exit"))
def test_a_first_prompt_is_that_of_float_caches(form: str, bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """It attends to its keys and values before they are rounded; a second prompt and decode steps do not."""
    case, how = FORMS[form]
    convert(CONFORMANCE / case, tmp_path / "float", max_length=64, golden=False, **how)
    runs = []
    for bundle in (bundle_of(form), Bundle.open(tmp_path / "float")):
        executor = Executor(bundle, threads=1)
        cache = executor.full_cache(2, 40)
        first = executor.prefill(cache, [TEXT[:17], TEXT[8:17]], all_logits=True)
        second = executor.prefill(cache, [TEXT[20:25], TEXT[25:28]], all_logits=True)
        runs.append((*first, *second, executor.step(cache, TEXT[30:32], bundle.manifest.full)))
    *prompts, third, fourth, step = (float(np.abs(ours - theirs).max()) for ours, theirs in zip(*runs, strict=True))
    assert max(prompts) < 1e-5
    assert min(third, fourth, step) > 1e-4 and max(third, fourth, step) < 0.5


def test_prompts_of_one_token_are_the_same_beside_others(bundle_of: Callable[[str], Bundle]) -> None:
    """Such a token attends to its stored value, and is not padded to a longer prompt, where it would to its own."""
    prompts = [TEXT[:1], TEXT[1:8], TEXT[10:11]]
    for given in (prompts, prompts[:1], prompts[::2]):
        report = verify(bundle_of("mod"), CONFORMANCE / "mod-router", threads=1, new_tokens=2, prompts=given)
        assert failures(report) == {}


def test_graphs_of_decode_steps_alone_have_no_branch_for_prompts(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("skip static")
    count = {
        graph.name: sum(
            node.op_type == "If" for node in onnx.load(bundle.path / graph.file, load_external_data=False).graph.node
        )
        for graph in bundle.manifest.graphs
    }
    layers = bundle.manifest.model.layers
    assert count == {"model": layers, "decode-2": 0}


def test_graphs_that_scale_one_cache_differently_are_refused(
    bundle_of: Callable[[str], Bundle], tmp_path: Path
) -> None:
    planted = Planted(bundle_of("skip static"), tmp_path / "copy")
    with planted.graph("model") as edited:
        other_scale("2.key", 2)(edited)
    with pytest.raises(DynexportError, match=r"2\.key: expected the same scales in every graph"):
        verified(planted.bundle(), CONFORMANCE / "skip-2x")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "text alone": ("dense", {"kv_cache_dtype": "auto"}, "kv_cache_text: expected with kv_cache_dtype int8, found auto"),
    "another type": (
        "dense",
        {"kv_cache_dtype": "int4"},
        "kv_cache_dtype: expected one of auto, fp32, fp16, int8, found 'int4'",
    ),
    "TensorRT": (
        "dense",
        {"target": "tensorrt"},
        "kv_cache_dtype: expected int8 with the target onnxruntime only, fou",
    ),
    "radial": ("radial-step", {}, "kv_cache_dtype: expected auto with the strategy radial"),
    "radial, one graph": (
        "radial-layer",
        {"layer_capacity": 1.0},
        "kv_cache_dtype: expected auto with the strategy ra",
    ),
    "a short text": ("dense", {"kv_cache_text": TEXT[:20]}, "text: expected at least one window of 64 tokens"),
    "unknown tokens": ("dense", {"kv_cache_text": [10**6] * 64}, "text: expected token ids 0..88"),
    "no tokenizer": ("dense", {"kv_cache_text": "A text."}, "kv_cache_text: expected tokenizer.json to read the text"),
    "no tokenizer, own text": (
        "dense",
        {"kv_cache_text": None},
        "kv_cache_text: expected tokenizer.json to read the t",
    ),
    "an idle layer": (
        "mod-router",
        {"fields": {"decision": {"threshold": 1.0}}},
        "kv cache: layer 1: expected tokens of the text that run in it, found none; give a longer text",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_conversion_is_refused(why: str, tmp_path: Path) -> None:
    case, how, told = REFUSED[why]
    options = {"kv_cache_dtype": "int8", "kv_cache_text": TEXT, "max_length": 64, "golden": False} | how
    with pytest.raises(DynexportError) as error:
        convert(CONFORMANCE / case, tmp_path / "bundle", **options)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_a_text_or_its_own(tmp_path: Path) -> None:
    model, text = talking_checkpoint(tmp_path / "model"), tmp_path / "text"
    text.write_text("".join(chr(33 + token % 60) for token in TEXT))
    how: Sequence[object] = ("convert", model, "--kv-cache-dtype", "int8", "--max-length", 64, "--no-golden", "-o")
    for more, source in ((("--kv-cache-text", text), "given"), ((), "built-in")):
        done = dynexport(*how, tmp_path / source, *more)
        assert done.code == 0, done
        recorded = Bundle.open(tmp_path / source).manifest.cache_text
        assert recorded is not None and recorded.source == source
        assert (recorded.tokens % 64, recorded.tokens > 300) == (0, True)
    told = error_of(dynexport(*how, tmp_path / "none", "--kv-cache-text", tmp_path / "absent"))
    assert "absent: expected a text file" in told
    assert "int8, 256 bytes per token" in dynexport("inspect", tmp_path / "given").out


def test_calibrate_shows_how_the_scales_suit_a_text(tmp_path: Path) -> None:
    """Of the text that they come from, nothing is beyond the range; of another one, something is."""
    model, text, other = talking_checkpoint(tmp_path / "model"), tmp_path / "text", tmp_path / "other"
    text.write_text("".join(chr(33 + token % 30) for token in TEXT))
    other.write_text("".join(chr(64 + token % 50) for token in TEXT))
    how: Sequence[object] = ("--kv-cache-dtype", "int8", "--max-length", 64, "--no-golden", "--kv-cache-text", text)
    assert dynexport("convert", model, *how, "-o", tmp_path / "bundle").code == 0
    shares = []
    for shown in (text, other):
        done = dynexport("calibrate", tmp_path / "bundle", "--text", shown, "--window", 64, "--json", tmp_path / "json")
        assert done.code == 0 and "keys at end" in done.out, done
        caches = json.loads((tmp_path / "json").read_text())["caches"]
        assert [cache["place"] for cache in caches] == list(range(8))
        assert {cache["entries"] for cache in caches} == {384}
        # Values of the first layer depend on their tokens alone; an integer of -128 is beyond the range of the scale.
        assert caches[0]["largest_value"] == (127 if shown == text else 128)
        shares.append(sum(cache["values_at_end"] for cache in caches))
    assert 0 < shares[0] < shares[1]
    refused = error_of(
        dynexport("calibrate", tmp_path / "bundle", "--text", text, "--window", 64, "--target-rate", 0.5)
    )
    assert "expected one whose routers have thresholds to calibrate, found unified-skip" in refused
