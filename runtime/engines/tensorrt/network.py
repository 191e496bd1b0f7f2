"""Parse an ONNX file into a TensorRT network, and turn TensorRT's messages into one-line errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.shapes import ShapeRange

_LONGEST = 400
_FORMATS = re.compile(
    r"Cannot compile for target\(s\) ([\w, ]+), because the model contains HW-specific datatypes: ([\w, ]+)"
)
_IMPORTER = re.compile(r"import([A-Z]\w+)")
_PREFIX = re.compile(r"^I\w+::\w+: (Error Code \d+: )?")


class Log:
    """A logger that collects TensorRT's error messages and prints nothing.

    Attributes:
        errors: error messages in order; the first is the cause, the others follow from it.
        logger: the object to pass to TensorRT.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        errors, worst = self.errors, (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]  # a class of a module that is chosen at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in worst:
                    errors.append(text)

        self.logger = Logger()

    def refusal(self) -> str:
        """Return the reason of a failure."""
        if not self.errors:
            return "it gives no reason"
        formats = _FORMATS.search(self.errors[0])
        if formats:
            lacking = ", ".join(_capability(name) for name in formats[1].split(", "))
            return (
                f"expected number formats that compute capability {lacking} has, found {formats[2]}; build for another "
                "--compute-capability, or convert with another --precision"
            )
        return one_line(_PREFIX.sub("", self.errors[0]))


def parse(trt: Any, builder: Any, log: Log, model: Path, *, plugins: bool) -> tuple[Any, Any]:
    """Return the strongly typed network of an ONNX file, and the parser, which owns the weights: keep both alive.

    Args:
        model: the ONNX file; its external data is in the same directory.
        plugins: whether registered plugins replace functions of the same name.

    Raises:
        DynexportError: when TensorRT does not support a node; it names the node, its operator and the reason.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if plugins:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(model)):
        raise DynexportError(parser_refusal(parser, log))
    _let_attention_decompose(trt, network)
    return network, parser


def add_profile(builder: Any, config: Any, network: Any, shapes: dict[str, ShapeRange]) -> None:
    """Add an optimization profile.

    Args:
        shapes: minimum, optimum and maximum shape of every input with a dynamic shape, by name.

    Raises:
        DynexportError: when they do not fit the network's inputs.
    """
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        dims = tuple(tensor.shape)
        if -1 not in dims:
            continue
        found = shapes.get(tensor.name)
        if found is None or len(found[0]) != len(dims):
            raise DynexportError(
                f"input {tensor.name}: expected {len(dims)} dimensions in the manifest as in the graph, found "
                f"{len(found[0]) if found else 'no symbol among them'}"
            )
        for dim, sizes in zip(dims, zip(*found, strict=True), strict=True):
            if dim != -1 and set(sizes) != {dim}:
                raise DynexportError(
                    f"input {tensor.name}: expected {dim} as in the graph, found {sizes[0]} in the manifest"
                )
        profile.set_shape(tensor.name, *found)
    if config.add_optimization_profile(profile) < 0:
        raise DynexportError("TensorRT refuses the optimization profile; convert the model again")


def parser_refusal(parser: Any, log: Log) -> str:
    """Return the parser's first error that names a node; it is the cause, the others follow from it."""
    if not parser.num_errors:
        return log.refusal()
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    error = next((error for error in errors if error.node_operator()), errors[0])
    reason = one_line(_PREFIX.sub("", error.desc()))
    if error.node_operator():
        return f"node {error.node_name() or error.node()} ({error.node_operator()}): {reason}"
    # Some importers do not name the node, but are named after its operator.
    operator = _IMPORTER.fullmatch(error.func())
    return f"a node ({operator[1]}): {reason}" if operator else f"the graph: {reason}"


def one_line(text: str) -> str:
    """Return a message without line breaks, cut to 400 characters."""
    return " ".join(text.split())[:_LONGEST]


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Let attention be decomposed if there is no fused kernel, as for float32 or small heads.

    In ONNX this needs an attribute that the checker rejects; setting it here keeps the files valid.
    """
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _capability(name: str) -> str:
    digits = name.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"
