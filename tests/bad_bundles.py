"""Bundles that are damaged in one way each, and the words that every runtime refuses them with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from bad_manifests import CHANGES, RUN, Change
from bad_values import CONTENTS
from bundles import change_manifest, replace_file
from onnx import TensorProto, helper

Damage = Callable[[Path], object]
Insert = Callable[[onnx.ModelProto, onnx.TensorProto], object]


@dataclass(frozen=True)
class Bad:
    """A way to damage a bundle of ``skip_bundle``, in place.

    Attributes:
        damage: called with the bundle's directory.
        words: what the error says, among other things.
        opens: whether it opens, and is refused when it is run.
    """

    damage: Damage = field(repr=False)
    words: tuple[str, ...]
    opens: bool = False


def bit_flipped(name: str, place: int) -> Damage:
    def damage(bundle: Path) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[place] ^= 1
        (bundle / name).write_bytes(content)

    return damage


def cut(name: str, end: int | None, more: bytes = b"") -> Damage:
    return lambda bundle: (bundle / name).write_bytes((bundle / name).read_bytes()[:end] + more)


def replaced(name: str, make: Damage) -> Damage:
    """Another kind of file in the place of a file."""

    def damage(bundle: Path) -> None:
        (bundle / name).unlink()
        make(bundle / name)

    return damage


def linked(name: str) -> Damage:
    """A link in the place of a file, to the same content elsewhere."""

    def damage(bundle: Path) -> None:
        shutil.move(bundle / name, bundle.parent / name)
        (bundle / name).symlink_to(bundle.parent / name)

    return damage


def content_of(name: str, content: bytes) -> Damage:
    """Another content for a file, the manifest's hash included."""
    if name == "manifest.json":
        return lambda bundle: (bundle / name).write_bytes(content)
    return lambda bundle: replace_file(bundle, name, content)


def changed(change: Change) -> Damage:
    return lambda bundle: change_manifest(bundle, change)


def endless_manifest(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)


def no_bundle(make: Damage) -> Damage:
    def damage(bundle: Path) -> None:
        shutil.rmtree(bundle)
        make(bundle)

    return damage


def interrupted(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / ".dynexport-next").mkdir()


def listed(name: str) -> Damage:
    """A file in the manifest whose name is none of a file of the bundle."""

    def damage(bundle: Path) -> None:
        (bundle.parent / "secret").write_bytes(b"secret")
        entry = {"sha256": "0" * 64, "bytes": 6}
        change_manifest(bundle, lambda fields: fields["files"].update({name: entry}))

    return damage


def changed_graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    def damage(bundle: Path) -> None:
        model = onnx.load(bundle / "model.onnx", load_external_data=False)
        change(model)
        replace_file(bundle, "model.onnx", model.SerializeToString())

    return damage


def outside(location: str) -> onnx.TensorProto:
    """A tensor whose data lies elsewhere."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def external(insert: Insert, location: str) -> Damage:
    def damage(bundle: Path) -> None:
        (bundle.parent / "secret").write_bytes(b"secret")
        changed_graph(lambda model: insert(model, outside(location)))(bundle)

    return damage


def branch(model: onnx.ModelProto) -> onnx.GraphProto:
    """The body of a condition inside the graph."""
    conditions = (node for node in model.graph.node if node.op_type == "If")
    return next(conditions).attribute[0].g


def constant(**value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["stolen"], **value)


def function(nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function("d", "f", [], ["stolen"], nodes, [helper.make_opsetid("", 24)])


def as_default_of_a_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    added = function([])
    added.attribute_proto.append(helper.make_attribute("value", tensor))
    model.functions.append(added)


def in_graphs_of_an_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    graph = helper.make_graph([], "g", [], [], [tensor])
    model.graph.node.append(constant(graphs=[graph]))


def as_sparse_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(constant(sparse_value=onnx.SparseTensorProto(values=tensor, dims=[4])))


def as_indices_of_sparse_attributes(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(constant(sparse=[onnx.SparseTensorProto(indices=tensor, dims=[4])]))


# Every way by which a tensor can be reached.
INSERTS: dict[str, Insert] = {
    "initializer": lambda model, tensor: model.graph.initializer.append(tensor),
    "attribute": lambda model, tensor: model.graph.node.append(constant(value=tensor)),
    "list of an attribute": lambda model, tensor: model.graph.node.append(constant(values=[tensor])),
    "sparse initializer": lambda model, tensor: model.graph.sparse_initializer.add(values=tensor, dims=[4]),
    "sparse attribute": as_sparse_attribute,
    "indices of sparse attributes": as_indices_of_sparse_attributes,
    "branch": lambda model, tensor: branch(model).initializer.append(tensor),
    "attribute in a branch": lambda model, tensor: branch(model).node.append(constant(value=tensor)),
    "graphs of an attribute": in_graphs_of_an_attribute,
    "function": lambda model, tensor: model.functions.append(function([constant(value=tensor)])),
    "default of a function": as_default_of_a_function,
    "training": lambda model, tensor: model.training_info.add().algorithm.initializer.append(tensor),
    "start of training": lambda model, tensor: model.training_info.add().initialization.initializer.append(tensor),
}
LOCATIONS = ("../secret", "/etc/hostname", "x/../../secret", "*/_ORT_MEM_ADDR_/*", "")


def weights_at(key: str, value: str) -> Damage:
    """Other values for where the first weight lies in its file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return changed_graph(change)


def weights_cut(bundle: Path) -> None:
    replace_file(bundle, "model.data", (bundle / "model.data").read_bytes()[:-4096])


def files() -> Iterator[tuple[str, Bad]]:
    """Damage to files that the manifest lists, and to their names."""
    out = "expected a plain file of the bundle; it leads out of it"
    for name in ("model.onnx", "model.data", "tokenizer.json", "chat_template.jinja"):
        for place in (0, -1):
            yield f"{name}: bit at {place}", Bad(bit_flipped(name, place), (f"{name}: expected sha256 ",))
        incomplete = (f"{name}: expected ", "; the bundle is incomplete, convert again")
        yield f"{name}: longer", Bad(cut(name, None, b" "), incomplete)
        yield f"{name}: cut", Bad(cut(name, -1), incomplete)
        yield f"{name}: empty", Bad(cut(name, 0), (*incomplete, "found 0 bytes"))
        yield f"{name}: missing", Bad(replaced(name, lambda _: None), (f"{name}: expected ", " bytes, found none"))
        yield f"{name}: a link", Bad(linked(name), (f"file '{name}': {out}",))
    for name in ("manifest.json", "model.onnx", "model.data", "tokenizer.json"):
        lost = "found a link" if name == "manifest.json" else out
        yield f"{name}: a pipe", Bad(replaced(name, os.mkfifo), ("found a pipe",))
        yield f"{name}: a directory", Bad(replaced(name, Path.mkdir), ("found a directory",))
        yield f"{name}: a lost link", Bad(replaced(name, lambda path: path.symlink_to("nowhere")), (lost,))
    for name in ("../secret", "/etc/hostname", "sub/file", ".", "..", ""):
        yield f"a file {name!r}", Bad(listed(name), (f"file {name!r}: {out}",))
    unreadable = "none that can be read (embedded null byte)"
    for name, found in (("a\nb", "none"), ("a\0b", unreadable)):
        yield f"a file {name!r}", Bad(listed(name), (f"expected 6 bytes, found {found}",))
    yield "a file of a long name", Bad(listed("x" * 999), ("found none that can be read (File name too long)",))


def manifests() -> Iterator[tuple[str, Bad]]:
    """Manifests that cannot be read or are wrong, and directories without one."""
    for name, content, words in CONTENTS:
        yield f"manifest: {name}", Bad(content_of("manifest.json", content), (words,))
    for name, change, words in CHANGES:
        yield f"manifest: {name}", Bad(changed(change), (words,), opens=name in RUN)
    large = f"manifest.json: expected a file of at most {16 << 20} bytes, found {1 << 40}"
    yield "manifest: endless", Bad(endless_manifest, (large,))
    none = "expected a bundle with a manifest.json, found none; "
    kinds: dict[str, Damage] = {"empty": Path.mkdir, "absent": lambda _: None, "a file": Path.touch}
    for name, make in kinds.items():
        yield f"bundle: {name}", Bad(no_bundle(make), (none + "make one with: dynexport convert",))
    yield "bundle: interrupted", Bad(interrupted, (none + "a conversion was interrupted, run it again",))


def graphs() -> Iterator[tuple[str, Bad]]:
    """Damage to graphs and weights whose hashes agree."""
    for name, insert in INSERTS.items():
        for location in LOCATIONS:
            words = f"model.onnx: tensor stolen: external data {location!r} is not a file of the bundle"
            yield f"external data {location!r} of {name}", Bad(external(insert, location), (words,))
    for content in (b"not a model", bytes(range(256))):
        words = "model.onnx: expected an ONNX model, found something else ("
        yield f"a graph of {content[:11]!r}", Bad(content_of("model.onnx", content), (words,))
    refused = ("model.onnx: ONNX Runtime refuses the graph: ",)
    yield "an empty graph", Bad(content_of("model.onnx", b""), refused, opens=True)
    for key, value in (("offset", "1" + "0" * 12), ("offset", "-4096"), ("offset", "x"), ("length", "1")):
        yield f"{key} {value}", Bad(weights_at(key, value), refused, opens=True)
    yield "a length beyond its file", Bad(weights_at("length", "1" + "0" * 12), refused, opens=True)
    yield "weights that are cut", Bad(weights_cut, refused, opens=True)


BAD_BUNDLES: dict[str, Bad] = {name: bad for part in (files(), manifests(), graphs()) for name, bad in part}
