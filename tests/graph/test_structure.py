"""The ONNX files of every family, strategy and precision, looked at without running them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx.defs import OpSchema
from onnxruntime.capi import onnxruntime_pybind11_state
from tiny_models import EXEMPLARS, FAMILIES, LAYERS, VARIANTS, save_model

from dynexport.exporter.bundle.conversion import Conversion, convert
from dynexport.exporter.bundle.operators import count_operators
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families import read_architecture

pytest.importorskip("transformers")

SKIP = {"strategy": "unified-skip", "speedups": (2.0,)}
STRATEGIES = {"dense": {"strategy": "dense"}, "conditional": SKIP, "static": {**SKIP, "static": True}}
# Exemplars and their variants in float32 with conditions, and a few in all the other ways.
OTHERS = itertools.product(("llama", "gemma2", "bloom"), STRATEGIES, ("fp32", "fp16", "int8", "int4"))
# Other families have the same modules in other forms; tests/families/test_parity.py runs all of them.
_NAMES = (*EXEMPLARS, *(name for name in VARIANTS if name.endswith("own-layers")))
CASES = [(name, "conditional", "fp32") for name in _NAMES]
CASES += [case for case in OTHERS if case not in CASES]
SYMBOLS = {"B", "S", "M", "K"}
WEIGHT = re.compile(
    r"(lm_head|model\.(embed_tokens|embed_positions|embed_norm|norm)"
    r"|model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj|q_norm|k_norm)|mlp\.(gate|up|down)_proj"
    r"|(input|post_attention|pre_feedforward|post_feedforward)_layernorm))"
    r"\.(weight|bias)(_quantized|_scales|_zero_points)?"
)
PAGE = 4096
LARGEST_FILE = 5 << 20

Graph = onnx.GraphProto
Convert = Callable[[str, str, str], Conversion]


@pytest.fixture(scope="module")
def converted(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Convert:
    @cache
    def make(name: str, strategy: str, precision: str) -> Conversion:
        output = tmp_path_factory.mktemp(name) / "bundle"
        return convert(saved_model(name), output, precision=precision, golden=False, **STRATEGIES[strategy])

    return make


@pytest.fixture(params=CASES, ids="-".join)
def done(request: pytest.FixtureRequest, converted: Convert) -> Conversion:
    return converted(*request.param)


@pytest.fixture(scope="module")
def microsoft_schemas() -> Iterator[None]:
    """ONNX Runtime's own operators made known to onnx, whose checker passes over what it does not know."""
    schemas = [s for s in onnxruntime_pybind11_state.get_all_operator_schema() if s.domain == "com.microsoft"]
    for schema in schemas:
        onnx.defs.register_schema(as_onnx(schema))
    yield
    for schema in schemas:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def as_onnx(schema: object) -> OpSchema:
    """onnxruntime.OpSchema, a type of another extension module, as onnx's own."""

    def formal(parameter: object) -> OpSchema.FormalParameter:
        option = OpSchema.FormalParameterOption(parameter.option.value)
        return OpSchema.FormalParameter(
            parameter.name, parameter.typeStr, param_option=option, is_homogeneous=parameter.isHomogeneous
        )

    return OpSchema(
        schema.name,
        schema.domain,
        schema.since_version,
        inputs=[formal(parameter) for parameter in schema.inputs],
        outputs=[formal(parameter) for parameter in schema.outputs],
        type_constraints=[(t.type_param_str, t.allowed_type_strs, "") for t in schema.type_constraints],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType(attribute.type.value), required=attribute.required)
            for name, attribute in schema.attributes.items()
        ],
    )


def graphs(done: Conversion) -> dict[str, Graph]:
    """By name, without the weights."""
    files = {graph.name: done.output / graph.file for graph in done.manifest.graphs}
    return {name: onnx.load(path, load_external_data=False).graph for name, path in files.items()}


def subgraphs(graph: Graph) -> list[Graph]:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return [attribute.g for attribute in attributes if attribute.HasField("g")]


def names(graph: Graph) -> list[str]:
    """Of everything that a graph itself defines."""
    outputs = [name for node in graph.node for name in node.output if name]
    return [value.name for value in (*graph.input, *graph.initializer)] + outputs


def external(graph: Graph) -> dict[str, dict[str, str]]:
    """Initializers in the data file -> where they lie."""
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def used(graph: Graph) -> set[str]:
    """Values that the graph's own nodes read, those of its subgraphs left out."""
    return {name for node in graph.node for name in node.input}


def used_inside(graph: Graph) -> set[str]:
    """Values that the nodes of a graph and of its subgraphs read."""
    return used(graph).union(*map(used_inside, subgraphs(graph)))


def test_onnx_checker(done: Conversion, microsoft_schemas: None) -> None:
    """Every node against its schema, contrib operators too, with full shape inference; and strictly, on top of it."""
    for graph in done.manifest.graphs:
        path = done.output / graph.file
        onnx.checker.check_model(path, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(
            onnx.load(path), check_type=True, strict_mode=True, data_prop=True
        ).graph
        typed = {value.name for value in (*inferred.value_info, *inferred.output)}
        assert {name for node in inferred.node for name in node.output if name} <= typed


def test_the_checker_knows_contrib_operators(converted: Convert, microsoft_schemas: None) -> None:
    model = onnx.load(converted("llama", "conditional", "fp32").output / "model.onnx")
    branch = next(branch for branch in subgraphs(model.graph) if branch.name == "layer_0_run")
    attention = next(node for node in branch.node if node.op_type == "GroupQueryAttention")
    attention.attribute.append(onnx.helper.make_attribute("no_such", 1))
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute: no_such"):
        onnx.checker.check_model(model, full_check=True)


def test_onnx_runtime_infers_the_declared_shapes(done: Conversion) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for graph in done.manifest.graphs:
        onnxruntime.InferenceSession(done.output / graph.file, options)


def test_inputs_and_outputs_are_as_the_manifest_says(done: Conversion) -> None:
    manifest = done.manifest
    for described, graph in zip(manifest.graphs, graphs(done).values(), strict=True):
        for specs, values in ((described.inputs, graph.input), (described.outputs, graph.output)):
            for spec, value in zip(specs, values, strict=True):
                tensor = value.type.tensor_type
                shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
                dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
                assert (value.name, dtype, shape) == (spec.name, spec.dtype, spec.shape)
                assert {dim for dim in shape if isinstance(dim, str)} <= SYMBOLS
        inputs = {spec.name: spec.shape for spec in described.inputs}
        count = len(described.layers)
        assert inputs["input_ids"] == inputs["position_ids"] == ("B", "S")
        assert inputs["cache_lengths"] == (count, "B")
        assert inputs.get("layer_active") == ((count,) if described.takes("layer_active") else None)
        heads = manifest.model.kv_heads_of_layers or (manifest.model.kv_heads,) * LAYERS
        for layer in described.layers:
            of_layer = [inputs.get(f"past_key_values.{layer}.{part}") for part in ("key", "value")]
            shape = ("B", heads[layer], "M", math.ceil(manifest.model.head_dim / 8) * 8)
            assert of_layer == [shape if heads[layer] else None] * 2
        outputs = {spec.name: spec.shape for spec in described.outputs}
        assert outputs.pop("logits") == ("B", "K", manifest.model.vocab_size)
        pasts = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values")}
        assert outputs == {name.replace("past_key_values", "present"): shape for name, shape in pasts.items()}


def test_heads_are_padded_only_where_the_kernel_wants_it(done: Conversion) -> None:
    padded = done.manifest.model.head_dim % 8 != 0
    for graph in done.manifest.graphs:
        counts = count_operators(done.output / graph.file)
        assert (counts["", "Pad"] > 0) == padded


def test_positions_are_cached_only_where_they_matter(done: Conversion) -> None:
    """In layers with ALiBi or a window, when layers can be skipped."""
    architecture = read_architecture(done.manifest.source.config)
    skips = done.manifest.contract.strategy != "dense"
    expected = tuple(i for i in range(LAYERS) if skips and architecture.needs_key_positions(i))
    assert tuple(cache.place for cache in done.manifest.caches if "position" in cache.parts) == expected
    for graph in done.manifest.graphs:
        cached = {spec.name for spec in graph.inputs if spec.name.endswith(".position")}
        assert cached == {f"past_key_values.{i}.position" for i in expected if i in graph.layers}


def test_names_are_unique_and_weights_are_called_as_in_hugging_face(done: Conversion) -> None:
    for graph in graphs(done).values():
        outer = names(graph)
        for inner in (names(branch) for branch in subgraphs(graph)):
            assert len(outer + inner) == len({*outer, *inner})
        assert not [name for name in external(graph) if not WEIGHT.fullmatch(name)]


def test_every_weight_is_stored_once(done: Conversion) -> None:
    places: dict[str, tuple[int, int]] = {}
    for graph in graphs(done).values():
        for name, entry in external(graph).items():
            place = int(entry["offset"]), int(entry["length"])
            assert entry["location"] == "model.data"
            assert places.setdefault(name, place) == place
    end = 0
    for offset, length in sorted(places.values()):
        assert end <= offset < end + PAGE, "neither overlap nor gap"
        assert offset % PAGE == 0
        end = offset + length
    assert (done.output / "model.data").stat().st_size == end
    checkpoint = open_checkpoint(done.manifest.source.model)
    stored = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    # Norms of these families have no biases, or no tensors at all; the graph has zeros and ones for them.
    added = {"cohere": LAYERS + 1, "olmo": 2 * (2 * LAYERS + 1)}.get(done.manifest.model.family, 0)
    assert done.manifest.model.parameters == stored + added * done.manifest.model.hidden_size


def test_one_condition_a_layer_and_its_weights_inside(done: Conversion) -> None:
    for described, graph in zip(done.manifest.graphs, graphs(done).values(), strict=True):
        branches = {branch.name: branch for branch in subgraphs(graph)}
        flops = done.manifest.cost.flops_of_layers or (1,) * LAYERS
        layers = [i for i in described.layers if flops[i]] if described.takes("layer_active") else []
        assert [node.op_type for node in graph.node].count("If") == len(layers)
        assert set(branches) == {f"layer_{i}_{kind}" for i in layers for kind in ("run", "skip")}
        for layer in layers:
            weights = {name for name in external(graph) if name.startswith(f"model.layers.{layer}.")}
            assert weights <= used(branches[f"layer_{layer}_run"])
            others = [g for name, g in branches.items() if name != f"layer_{layer}_run"]
            assert not weights & set().union(*map(used, (graph, *others)))
            assert {node.op_type for node in branches[f"layer_{layer}_skip"].node} == {"Identity"}


def test_the_file_without_weights_is_small(done: Conversion) -> None:
    assert all((done.output / graph.file).stat().st_size < LARGEST_FILE for graph in done.manifest.graphs)


def test_a_long_context_does_not_make_the_file_larger(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", {**FAMILIES["llama"], "max_position_embeddings": 1 << 20})
    convert(tmp_path / "model", tmp_path / "bundle", golden=False)
    assert (tmp_path / "bundle" / "model.onnx").stat().st_size < 1 << 20


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_step_widens_no_float16_weights(name: str, converted: Convert, tmp_path: Path) -> None:
    """ONNX Runtime has folded the casts, those inside the conditions too, when it has loaded the session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(converted(name, "conditional", "fp16").output / "model.onnx", options)
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    every = [graph, *subgraphs(graph)]
    widened = {name for g in every for node in g.node if node.op_type == "Cast" for name in node.input}
    assert halves <= {"model.embed_tokens.weight"}
    assert not halves & widened
