"""A copy of a bundle to plant a fault in: its graphs, weights, manifest and golden vectors, with hashes that agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import GOLDEN, MANIFEST, WEIGHTS, File

Nodes = list[onnx.NodeProto]


class Planted:
    """The copy.

    Args:
        directory: of the copy, made here.
    """

    def __init__(self, bundle: Bundle, directory: Path) -> None:
        directory.mkdir()
        for file in bundle.path.iterdir():
            # ONNX Runtime refuses weights of branches in a file with several hard links.
            if file.name == WEIGHTS:
                shutil.copyfile(file, directory / file.name)
            else:
                (directory / file.name).hardlink_to(file)
        self.path, self._changed = directory, set[str]()

    def bundle(self) -> Bundle:
        """The bundle with its fault, every hash right."""
        entries = {name: File.of(self.path / name).model_dump() for name in self._changed}
        if entries:
            with self.manifest() as fields:
                fields["files"].update(entries)
        return Bundle.open(self.path)

    @contextmanager
    def graph(self, name: str = "model") -> Iterator[Edited]:
        """A graph to change."""
        model = onnx.load(self.path / f"{name}.onnx", load_external_data=False)
        yield Edited(model)
        self._write(f"{name}.onnx", model.SerializeToString())

    def weight(self, name: str, change: Callable[[np.ndarray], Any], graph: str = "model") -> None:
        """Another value for a float32 weight: ``change`` gets it, to write in place."""
        model = onnx.load(self.path / f"{graph}.onnx", load_external_data=False)
        stored = next(value for part in _graphs(model.graph) for value in part.initializer if value.name == name)
        place = {entry.key: entry.value for entry in stored.external_data}
        if not place:
            value = onnx.numpy_helper.to_array(stored).copy()
            change(value)
            stored.CopyFrom(onnx.numpy_helper.from_array(value, name))
            return self._write(f"{graph}.onnx", model.SerializeToString())
        content = bytearray((self.path / WEIGHTS).read_bytes())
        shape = tuple(stored.dims)
        values = np.frombuffer(content, np.float32, int(np.prod(shape)), int(place["offset"])).reshape(shape)
        change(values)
        return self._write(WEIGHTS, bytes(content))

    @contextmanager
    def manifest(self) -> Iterator[dict[str, Any]]:
        """The manifest's fields to change."""
        path = self.path / MANIFEST
        fields = json.loads(path.read_text())
        yield fields
        path.unlink()
        path.write_text(json.dumps(fields))

    @contextmanager
    def golden(self) -> Iterator[dict[str, np.ndarray]]:
        """The golden vectors to change."""
        tensors = load_file(self.path / GOLDEN)
        yield tensors
        (self.path / GOLDEN).unlink()
        save_file(tensors, self.path / GOLDEN)
        self._changed.add(GOLDEN)

    def _write(self, name: str, content: bytes) -> None:
        (self.path / name).unlink()
        (self.path / name).write_bytes(content)
        self._changed.add(name)


class Edited:
    """A graph under change; nodes inside branches count as its own."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph

    def nodes(self, kind: str | None = None, within: str = "") -> Nodes:
        """Nodes of an operator whose names contain something."""
        found = [node for graph in _graphs(self.graph) for node in graph.node]
        return [node for node in found if kind in (None, node.op_type) and within in node.name]

    def node(self, kind: str, within: str = "") -> onnx.NodeProto:
        """The first of them."""
        return self.nodes(kind, within)[0]

    def behind(self, name: str) -> onnx.NodeProto:
        """The node that gives a value."""
        return next(node for node in self.nodes() if name in node.output)

    def number(self, name: str) -> np.ndarray | None:
        """A constant."""
        found = [value for graph in _graphs(self.graph) for value in graph.initializer if value.name == name]
        found += [node.attribute[0].t for node in self.nodes("Constant") if name in node.output]
        return onnx.numpy_helper.to_array(found[0]) if found and not found[0].external_data else None

    def with_number(self, kind: str, value: float, place: int = 1) -> Nodes:
        """Nodes of an operator with this constant at a place."""
        found = [(node, self.number(node.input[place])) for node in self.nodes(kind)]
        return [node for node, number in found if number is not None and number.size == 1 and float(number) == value]

    def constant(self, value: Any, dtype: Any) -> str:
        """A new constant; its name."""
        name = f"planted_{len(self.graph.initializer)}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def change_number(self, node: onnx.NodeProto, place: int, value: Any) -> None:
        """Another constant of the same type for one node alone."""
        number = self.number(node.input[place])
        assert number is not None
        node.input[place] = self.constant(value, number.dtype)

    def insert(self, kind: str, inputs: list[str], output: str, before: onnx.NodeProto, **attributes: Any) -> None:
        """A new node, before another one."""
        (graph,) = (graph for graph in _graphs(self.graph) if before in graph.node)
        graph.node.insert(list(graph.node).index(before), onnx.helper.make_node(kind, inputs, [output], **attributes))

    def bypass(self, node: onnx.NodeProto, place: int = 0) -> None:
        """Let one of its inputs pass a node unchanged."""
        kept = node.input[place]
        self.become(node, "Identity", [kept])

    def become(self, node: onnx.NodeProto, kind: str, inputs: list[str]) -> None:
        """Make another one of a node, with the same first output."""
        output, name = node.output[0], node.name
        node.Clear()
        node.CopyFrom(onnx.helper.make_node(kind, inputs, [output], name=name))

    def replace_input(self, old: str, new: str, nodes: Nodes) -> None:
        """Another value wherever these nodes take one."""
        for node in nodes:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    """An attribute, to be changed."""
    return next(found for found in node.attribute if found.name == name)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for found in node.attribute:
            if found.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(found.g)
