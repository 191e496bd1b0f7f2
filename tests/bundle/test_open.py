"""Opening a bundle: damage of any kind is one line that names the place, and nothing outside of it is ever read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE, change_manifest, copied, dynexport, error_of, replace_file
from onnx import TensorProto, helper

from dynexport.exporter.bundle import writer as bundle_writer
from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Model
from dynexport.runtime.bundle import bundle as bundle_module
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.text.text import Text

Change = Callable[[dict[str, Any]], object]


def refusal(bundle: Path) -> str:
    """What opening and running it says, which must be one line without the traceback of another error."""
    with pytest.raises(DynexportError) as caught:
        Model(Bundle.open(bundle), threads=1).generate([[1, 2, 3]], max_new_tokens=2)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


def _key(fields: dict[str, Any]) -> dict[str, Any]:
    """The input that is the first layer's key cache."""
    inputs = fields["graphs"][0]["inputs"]
    return next(spec for spec in inputs if spec["name"] == "past_key_values.0.key")


def _cached(fields: dict[str, Any]) -> dict[str, Any]:
    """The same, as the caches describe it."""
    return fields["caches"][0]["parts"]["key"]


def _key_shape(fields: dict[str, Any]) -> list[Any]:
    return _key(fields)["shape"]


def test_a_bundle_opens(bundle: Path) -> None:
    opened = Bundle.open(str(bundle))
    assert opened.manifest.files.keys() == {path.name for path in bundle.iterdir()} - {"manifest.json"}
    assert opened.file("model.onnx") == bundle / "model.onnx" and opened.file("manifest.json") is None
    assert Text.of_bundle(opened).has_chat_template


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit(bundle: Path, name: str, place: int) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[place] ^= 1
    (bundle / name).write_bytes(content)
    assert f"{bundle / name}: expected sha256 " in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "tokenizer.json"])
def test_a_missing_cut_or_longer_file(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    for changed, found in ((content + b" ", len(content) + 1), (content[:-1], len(content) - 1), (b"", 0)):
        (bundle / name).write_bytes(changed)
        assert f"{name}: expected {len(content)} bytes, found {found} bytes; the bundle is incomplete" in refusal(
            bundle
        )
    (bundle / name).unlink()
    assert f"{name}: expected {len(content)} bytes, found none" in refusal(bundle)


def test_large_files_are_hashed_when_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynexport.runtime.bundle.bundle._HASHED_WHEN_OPENED", 10_000)
    content = bytearray((bundle / "model.data").read_bytes())
    content[-1] ^= 1
    (bundle / "model.data").write_bytes(content)
    opened = Bundle.open(bundle)
    with pytest.raises(DynexportError, match=r"model.data: expected sha256 .* convert again"):
        opened.check()
    assert dynexport("inspect", bundle).code == 0
    assert "model.data: expected sha256" in error_of(dynexport("inspect", bundle, "--check"))
    assert "model.data: expected sha256" in error_of(dynexport("verify", bundle))


@pytest.fixture
def other(bundle: Path) -> Path:
    """A bundle of the same graphs and sizes with other weights, as of a model that was trained on."""
    other = copied(bundle, bundle.parent / "other")
    replace_file(other, "model.data", bytes((other / "model.data").stat().st_size))
    return other


def exchanged(bundle: Path, other: Path) -> None:
    assert bundle_writer.exchange(other, bundle)


def removed(bundle: Path, other: Path) -> None:
    shutil.rmtree(bundle)


def written_to(bundle: Path, other: Path) -> None:
    shutil.copyfile(other / "model.data", bundle / "model.data")


def moved_in(bundle: Path, other: Path) -> None:
    for name in ("model.data", "manifest.json"):
        (other / name).replace(bundle / name)


def of_the_same_age(bundle: Path, other: Path) -> None:
    """As where both were unpacked from archives."""
    os.utime(other / "model.data", ns=(0, (bundle / "model.data").stat().st_mtime_ns))
    (other / "model.data").replace(bundle / "model.data")


@pytest.mark.parametrize("change", [exchanged, removed, written_to, moved_in, of_the_same_age])
def test_what_is_loaded_is_what_was_opened(
    bundle: Path, other: Path, change: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynexport.runtime.bundle.bundle._HASHED_WHEN_OPENED", 10_000)
    opened = Bundle.open(bundle)
    loaded, lazy, text = Model(opened, threads=1), Model(opened, threads=1), Text.of_bundle(opened)
    before = loaded.generate([[1, 2, 3]], max_new_tokens=3)[0].ids
    change(bundle, other)
    for late in (lambda: lazy.generate([[1, 2, 3]], max_new_tokens=3), opened.check):
        with pytest.raises(DynexportError, match="expected the file that was there when the bundle was opened"):
            late()
    if change is written_to:
        return  # an engine maps weights: what is written into their file reaches it (docs/bundle.md)
    assert text.has_chat_template and loaded.generate([[1, 2, 3]], max_new_tokens=3)[0].ids == before


def test_a_bundle_that_is_replaced_while_it_is_opened(
    bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynexport.runtime.bundle.bundle._HASHED_WHEN_OPENED", 10_000)
    read = bundle_module._read_manifest

    def interrupted(directory: Path) -> Manifest:
        manifest = read(directory)
        exchanged(bundle, other)
        return manifest

    monkeypatch.setattr(bundle_module, "_read_manifest", interrupted)
    with pytest.raises(DynexportError, match=r"manifest.json: expected the file that was there when the bundle was op"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.data", "tokenizer.json"])
def test_what_lies_in_the_place_of_a_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert "found a pipe" in refusal(bundle)
    (bundle / name).unlink()
    (bundle / name).mkdir()
    assert "found a directory" in refusal(bundle)
    (bundle / name).rmdir()
    (bundle / name).symlink_to("nowhere")
    assert "found a link" in refusal(bundle) or "leads out of it" in refusal(bundle)


def test_a_file_that_the_manifest_does_not_list_is_not_used(bundle: Path) -> None:
    change_manifest(bundle, lambda fields: fields["files"].pop("tokenizer.json"))
    assert not Text.of_bundle(Bundle.open(bundle)).has_tokenizer


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, -1, [2], "x" * 1000])
def test_other_schema_versions(bundle: Path, version: object) -> None:
    change_manifest(bundle, lambda fields: fields.update(schema_version=version))
    message = refusal(bundle)
    assert "schema_version: expected 2, found " in message
    assert "\n" not in message
    assert ("update" if version == 3 else "convert the model again") in message


def test_no_schema_version(bundle: Path) -> None:
    change_manifest(bundle, lambda fields: fields.pop("schema_version"))
    assert "schema_version: expected 2, found None; convert the model again" in refusal(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"not json\nat all"],
    ids=["empty", "cut", "binary", "nested", "a huge number", "text"],
)
def test_a_manifest_that_is_not_json(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    assert "manifest.json: expected JSON, found something else" in refusal(bundle)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"'])
def test_a_manifest_that_is_no_object(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    assert "manifest.json: schema_version: expected 2, found None" in refusal(bundle)


def test_a_manifest_of_endless_size(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert "manifest.json: expected a file of at most 16777216 bytes" in refusal(bundle)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None, Path.touch], ids=["empty", "absent", "a file"])
def test_what_is_no_bundle(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "b")
    assert "expected a bundle with a manifest.json, found none; make one with: dynexport convert" in refusal(
        tmp_path / "b"
    )


DAMAGED: dict[str, tuple[Change, str]] = {
    "unknown field": (lambda f: f.update(surprise=1), "surprise: Extra inputs are not permitted"),
    "long unknown field": (lambda f: f.update({"x" * 9999: 1}), "Extra inputs are not permitted"),
    "missing field": (lambda f: f.pop("cost"), "cost: Field required"),
    "another type": (lambda f: f.update(graphs=3), "graphs: "),
    "no graph": (lambda f: f.update(graphs=[]), "graphs: "),
    "a long value": (lambda f: f["model"].update(heads="x" * 9999), "model.heads: "),
    "no layers": (lambda f: f["model"].update(layers=0), "model.layers: "),
    "endless layers": (lambda f: f["model"].update(layers=2**31 - 1), "cost.layers: expected 2147483647"),
    "another contract": (lambda f: f["contract"].update(strategy="guess"), "contract: "),
    "kept layers that are not there": (lambda f: f["depths"][0].update(keep=[0, 8]), "keep of depth 2: expected"),
    "kept layers twice": (lambda f: f["depths"][0].update(keep=[0, 0]), "keep of depth 2: expected ascending"),
    "no kept layers": (lambda f: f["depths"][0].update(keep=[]), "depths.0.keep: "),
    "a ratio twice": (lambda f: f["depths"].append(f["depths"][0]), "depths: expected a name for each"),
    "graph layers": (lambda f: f["graphs"][0].update(layers=[-1]), "layers of graph model: expected"),
    "layers of prompts": (lambda f: f["depths"][0].update(prompt=[8]), "prompt of depth 2: expected ascending layers"),
    "a depth that is everyone's": (lambda f: f["depths"][0].update(name="full"), "depths: expected other names than"),
    "no program": (lambda f: f.update(programs=f["programs"][:1]), "programs: no graph for the phase "),
    "another place": (lambda f: f["caches"][0].update(place=8), "caches: expected the places 0..7, found others"),
    "a cache too few": (lambda f: f["caches"].pop(), "caches: expected one for each of 8 layers, found 7"),
    "no values": (lambda f: f["caches"][0]["parts"].pop("value"), "cache 0: value: expected 2 heads of 8 as in model"),
    "a part that is not there": (lambda f: _key(f).update(name="past_key_values.0.step"), "0.step: expected a cache's"),
    "a place that is not there": (lambda f: _key(f).update(name="past_key_values.9.key"), "9.key: expected a cache's"),
    "free of cost": (lambda f: f["cost"].update(shared=0), "cost.shared: "),
    "no source": (lambda f: f["source"].pop("model"), "source.model: Field required"),
    "a hash that is none": (lambda f: f["files"]["model.data"].update(sha256="x"), "files.model.data.sha256: "),
    "a graph without its file": (lambda f: f["graphs"][0].update(file="other.onnx"), "expected its file other.onnx"),
    "no logits": (lambda f: f["graphs"][0].update(outputs=[]), "model.onnx: expected an output logits, found none"),
    "a type that nobody knows": (lambda f: _key(f).update(dtype="float8"), "dtype: String should match pattern"),
    "an input that is not there": (lambda f: f["graphs"][0]["inputs"].pop(), "expected the inputs that the manifest"),
    "other heads": (
        lambda f: _key_shape(f).__setitem__(1, 1),
        "past_key_values.0.key: expected float ['B', 2, 'M', 8] as in caches, found float ['B', 1, 'M', 8]",
    ),
    "other head size": (lambda f: f["model"].update(head_dim=16), "expected 2 heads of 16 as in model"),
    "a dimension that nobody knows": (
        lambda f: _key_shape(f).__setitem__(2, "Q"),
        "as in caches, found float ['B', 2,",
    ),
    "another type of cache": (
        lambda f: _key(f).update(dtype="float16"),
        "as in caches, found float16 ['B', 2, 'M', 8]",
    ),
    "other heads of caches": (
        lambda f: _cached(f)["shape"].__setitem__(1, 1),
        "cache 0: key: expected 2 heads of 8 as in model, found ['B', 1, 'M', 8]",
    ),
    "another dimension of caches": (lambda f: _cached(f)["shape"].__setitem__(2, "Q"), "caches.0.parts.key.shape.2"),
    "another type of caches": (lambda f: _cached(f).update(dtype="float16"), "expected float16 ['B', 2, 'M', 8] as in"),
}


@pytest.mark.parametrize(("change", "expected"), DAMAGED.values(), ids=DAMAGED)
def test_a_manifest_that_is_wrong(bundle: Path, change: Change, expected: str) -> None:
    change_manifest(bundle, change)
    assert expected in refusal(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ".", "", "a\nb"])
def test_names_of_files_that_leave_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"secret")
    entry = {"sha256": "0" * 64, "bytes": 6}
    change_manifest(bundle, lambda fields: fields["files"].update({name: entry}))
    with pytest.raises(DynexportError):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "tokenizer.json"])
def test_links_are_no_files_of_a_bundle(bundle: Path, name: str) -> None:
    shutil.move(bundle / name, bundle.parent / name)
    (bundle / name).symlink_to(bundle.parent / name)
    assert f"file '{name}': expected a plain file of the bundle; it leads out of it" in refusal(bundle)


def outside(location: str) -> onnx.TensorProto:
    """A tensor whose data lies elsewhere."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def as_initializer(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.initializer.append(tensor)


def as_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=tensor))


def as_list_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["stolen"], values=[tensor]))


def as_sparse_initializer(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.sparse_initializer.add(values=tensor, dims=[4])


def branch(model: onnx.ModelProto) -> onnx.GraphProto:
    """The body of a condition inside the graph."""
    conditions = (node for node in model.graph.node if node.op_type == "If")
    return next(conditions).attribute[0].g


def in_a_branch(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    branch(model).initializer.append(tensor)


def as_attribute_in_a_branch(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    branch(model).node.append(helper.make_node("Constant", [], ["stolen"], value=tensor))


def in_a_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 24)]))


PLACES = (
    as_initializer,
    as_attribute,
    as_list_attribute,
    as_sparse_initializer,
    in_a_branch,
    as_attribute_in_a_branch,
    in_a_function,
)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "x/../../secret", "*/_ORT_MEM_ADDR_/*", ""])
def test_external_data_outside_of_the_bundle(
    bundle: Path, place: Callable[[onnx.ModelProto, onnx.TensorProto], None], location: str
) -> None:
    (bundle.parent / "secret").write_bytes(b"secret")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    place(model, outside(location))
    replace_file(bundle, "model.onnx", model.SerializeToString())
    message = refusal(bundle)
    assert f"model.onnx: tensor stolen: external data {location!r} is not a file of the bundle" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "1" + "0" * 12), ("offset", "-4096"), ("offset", "x"), ("length", "1" + "0" * 12), ("length", "1")],
)
def test_external_data_beyond_its_file(bundle: Path, key: str, value: str) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    replace_file(bundle, "model.onnx", model.SerializeToString())
    assert "model.onnx: ONNX Runtime refuses the graph: " in refusal(bundle)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256))])
def test_a_graph_that_is_none(bundle: Path, content: bytes) -> None:
    replace_file(bundle, "model.onnx", content)
    assert "model.onnx: " in refusal(bundle)


def test_weights_that_are_too_short_for_their_graph(bundle: Path) -> None:
    replace_file(bundle, "model.data", (bundle / "model.data").read_bytes()[:-4096])
    assert "model.onnx: ONNX Runtime refuses the graph: " in refusal(bundle)


def test_weights_that_are_no_numbers_are_told_with_the_first_token(bundle: Path) -> None:
    size = (bundle / "model.data").stat().st_size // 4
    replace_file(bundle, "model.data", np.full(size, np.nan, np.float32).tobytes())
    assert "logits: row 0: expected a finite largest logit and no NaN" in refusal(bundle)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_text_files_that_are_none(bundle: Path, name: str) -> None:
    replace_file(bundle, name, b"\xff\xfe")
    assert f"{name}: " in refusal(bundle)


def test_the_ratios_of_a_bundle(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (declared,) = opened.manifest.depths
    assert [opened.depth(wanted) for wanted in (None, 2, "2", 2.0, "2.0")] == [declared] * 5
    assert [opened.depth(wanted).name for wanted in (1, "1", 1.0, "full")] == ["full"] * 4
    for wanted in (0, -1, 3, "nan", float("inf"), "", "two"):
        with pytest.raises(DynexportError, match=f"depth: expected 1, 2; found {wanted}"):
            opened.depth(wanted)


def test_a_bundle_says_whether_its_model_was_trained_for_its_strategy(bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.trained and [depth.trained for depth in manifest.depths] == [True] and manifest.full.trained
    for name, options in (("other", {"speedups": [1.5, 2]}), ("plain", {"strategy": "dense"})):
        convert(CONFORMANCE / "skip-2x", tmp_path / name, golden=False, **options)
    other, plain = (Bundle.open(tmp_path / name).manifest for name in ("other", "plain"))
    assert other.trained and {depth.name: depth.trained for depth in other.depths} == {"1.5": False, "2": True}
    assert not plain.trained
