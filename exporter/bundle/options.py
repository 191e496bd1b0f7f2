"""The options of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dynexport.exporter.lowering.onnxruntime import OnnxRuntime
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.lowering.tensorrt.target import MAX_BATCH, TensorRT
from dynexport.runtime.bundle.checks import is_number, shown
from dynexport.runtime.bundle.contract import SkipRule
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Precision, TargetName

# Called with what is being worked on, the weights done so far, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The engine that graphs are written for.

    Attributes:
        target: its name; ONNX Runtime runs the graphs of all of them.
        precision: how projections and embeddings are stored. For ONNX Runtime everything else is float32; for TensorRT
            hidden states and caches have that type as well, float16 with int8 and int4.
        max_batch: for TensorRT, the rows that engines are built for; None for 8.
        max_prompt: for TensorRT, the tokens that a run of a prompt takes, longer ones go in pieces; None for the
            context, at most 1024.
        plugins: for TensorRT, call operators of our own, which engines are then built and run with (docs/plugins.md);
            a Radial Network's bundle then has a graph for decode steps beside its set.
    """

    target: TargetName = "onnxruntime"
    precision: Precision = "fp32"
    max_batch: int | None = None
    max_prompt: int | None = None
    plugins: bool = False

    def open_target(self) -> Target:
        """Return the lowering for the target.

        Raises:
            DynexportError: for options that the engine does not have.
        """
        for name, value, known in (("precision", self.precision, Precision), ("target", self.target, TargetName)):
            if value not in get_args(known):
                raise DynexportError(f"{name}: expected one of {', '.join(get_args(known))}, found {shown(value)}")
        if self.target == "tensorrt":
            rows = MAX_BATCH if self.max_batch is None else self.max_batch
            return TensorRT(self.precision, rows, self.max_prompt, plugins=self.plugins)
        only_tensorrt = {"max_batch": self.max_batch, "max_prompt": self.max_prompt, "plugins": self.plugins or None}
        for option, given in only_tensorrt.items():
            if given is not None:
                raise DynexportError(
                    f"{option}: expected with the target tensorrt, found onnxruntime, which needs none"
                )
        return OnnxRuntime(self.precision)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(TargetOptions):
    """All options of a conversion.

    Attributes:
        strategy: one of ``strategies()``; None takes what config.json declares under "dynexport", else dense.
        speedups, rule, keep: override the contract's fields.
        fields: override any field of the contract, objects within it field by field; these go last.
        max_length: the bundle's context in tokens; None takes the model's, with longrope its original length.
        static: write a graph of the kept layers per ratio instead of one graph with conditions.
        layer_capacity: write a single graph of all steps of a Radial Network, in which every layer has room for this
            share of a step's tokens; None for the usual graphs.
        golden: write golden vectors, when torch and transformers are installed.
        tokenizer: a tokenizer.json, or a directory with one, to take instead of the model's own.
        importer: the routing code that has written the model, when that is not ours (docs/importing.md).
        progress: called with what is done, the weights so far, and how many there are.
    """

    strategy: str | None = None
    speedups: Sequence[float] = ()
    rule: SkipRule | None = None
    keep: Sequence[int] | None = None
    fields: Mapping[str, Any] | None = None
    max_length: int | None = None
    static: bool = False
    layer_capacity: float | None = None
    golden: bool = True
    tokenizer: Path | None = None
    importer: str | None = None
    progress: Progress | None = None

    def check_form(self) -> None:
        """Raise DynexportError for graph options that contradict each other or are out of range."""
        share = self.layer_capacity
        if share is None:
            return
        if self.static:
            raise DynexportError("--static: expected without --single-graph, found both")
        if not is_number(share) or not 0 < share <= 1:
            raise DynexportError(f"layer capacity: expected a share above 0 and up to 1, found {shown(share)}")


__all__ = ["ConvertOptions", "Progress", "TargetOptions"]
