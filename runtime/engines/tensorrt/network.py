"""An ONNX file as a TensorRT network, and what TensorRT says against it as one line."""

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
    """TensorRT's own messages, kept for when something fails; it prints nothing.

    Attributes:
        errors: in order; the first is the cause, the others follow from it.
        logger: for TensorRT.
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
        """Why a build failed."""
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
    """The network of an ONNX file, strongly typed, and the parser: it owns the weights, so both have to be kept.

    Args:
        model: its external data stands beside it.
        plugins: whether a registered plugin is to be taken for a function of the same name.

    Raises:
        DynexportError: when TensorRT cannot take a node; it names the node, its operator and the reason.
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
        shapes: least, usual and greatest shape of every input that has no fixed one.

    Raises:
        DynexportError: when the network's inputs are not those.
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
    """Of several errors the first that has a node: it is the cause, the others follow from it."""
    if not parser.num_errors:
        return log.refusal()
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    error = next((error for error in errors if error.node_operator()), errors[0])
    reason = one_line(_PREFIX.sub("", error.desc()))
    if error.node_operator():
        return f"node {error.node_name() or error.node()} ({error.node_operator()}): {reason}"
    # Some importers do not say which node it was, but are named after its operator.
    operator = _IMPORTER.fullmatch(error.func())
    return f"a node ({operator[1]}): {reason}" if operator else f"the graph: {reason}"


def one_line(text: str) -> str:
    """A message without line breaks, cut where it grows longer than anybody reads."""
    return " ".join(text.split())[:_LONGEST]


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Where there is no fused kernel, as in float32 or for small heads, attention may become products and a softmax.

    In ONNX this is an attribute that the checker rejects; set here, files stay valid and nothing has to be rewritten.
    """
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _capability(name: str) -> str:
    digits = name.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"
