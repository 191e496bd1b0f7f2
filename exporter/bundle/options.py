"""The options of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dynexport.exporter.lowering.onnxruntime import Kept, OnnxRuntime, Segments
from dynexport.exporter.lowering.plugged_onnxruntime import PluggedOnnxRuntime
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.lowering.tensorrt.target import MAX_BATCH, TensorRT
from dynexport.runtime.bundle.checks import is_integer, is_number, shown
from dynexport.runtime.bundle.contract import SkipRule
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Precision, TargetName

# Called with the name of the current work, the number of weights done, and their total number.
Progress = Callable[[str, int, int], None]
# Most tokens of a text that the scales of int8 caches are measured on.
CALIBRATION_TOKENS = 4096
# What a user may ask for; "auto" keeps a GGUF's blocks (bundle/precision.py).
PrecisionOption = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
CacheType = Literal["auto", "fp32", "fp16", "int8"]
Quantiser = Literal["auto", "nearest", "search", "gptq"]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The engine that graphs are written for.

    Attributes:
        target: the name of the engine; ONNX Runtime also runs the graphs for TensorRT.
        precision: the stored type of projections and embeddings: "auto" for the blocks of a GGUF file as they are, with
            ONNX Runtime, and fp32 for everything else. For ONNX Runtime everything else is float32. For
            TensorRT hidden_states and caches have this type too, or float16 for int8 and int4.
        max_batch: the most batch rows of an engine, for TensorRT only; None for 8.
        max_prompt: the largest prefill chunk in tokens, for TensorRT only; None for the context, at most 1024.
        kv_cache_dtype: the stored type of keys and values: "auto" for the type of hidden_states; or, for ONNX Runtime
            only, "fp32", "fp16" (with plugins), or "int8" with a scale for each channel.
        quantiser: how int4 weights are rounded, for ONNX Runtime only: "nearest" to symmetric integers, "search" for
            the scale and zero point of each block with the smallest error, or "gptq", which also makes up for errors
            with inputs that it measures on a text (PyTorch runs it). "auto" takes search.
        head_bits: for int4 and ONNX Runtime, the bits of the head and of embedding tables, 8 or 4; None for 8.
        sensitive: for the quantiser gptq, the share of the layers' weights that stay in 8 bits: of the matrices whose
            products on the text would lose most. None for 0.
        plugins: whether graphs use dynexport's custom operators (docs/plugins.md). For TensorRT, engines are then built
            and run with the plugin library, and a Radial Network's bundle also has a graph for decode steps. For ONNX
            Runtime on CPUs, the library has faster products, which also read bfloat16; without it, the graphs run the
            operators' bodies.
    """

    target: TargetName = "onnxruntime"
    precision: PrecisionOption = "auto"
    max_batch: int | None = None
    max_prompt: int | None = None
    plugins: bool = False
    kv_cache_dtype: CacheType = "auto"
    quantiser: Quantiser = "auto"
    head_bits: int | None = None
    sensitive: float | None = None

    def open_target(
        self,
        precision: Precision = "fp32",
        segments: Segments | None = None,
        kept: Kept | None = None,
        *,
        float_activations: bool = False,
    ) -> Target:
        """Return the lowering for the target.

        Args:
            precision: what the checkpoint makes of ``precision`` "auto".
            segments: as for ``OnnxRuntime``.
            kept: as for ``OnnxRuntime``.
            float_activations: as for ``OnnxRuntime``.

        Raises:
            DynexportError: for an unknown name, or an option that the engine does not have.
        """
        for name, value, known in (
            ("precision", self.precision, PrecisionOption),
            ("target", self.target, TargetName),
            ("kv_cache_dtype", self.kv_cache_dtype, CacheType),
            ("quantiser", self.quantiser, Quantiser),
        ):
            if value not in get_args(known):
                raise DynexportError(f"{name}: expected one of {', '.join(get_args(known))}, found {shown(value)}")
        if self.precision != "auto":
            precision = self.precision
        self._check_int4()
        if self.target == "tensorrt":
            if self.kv_cache_dtype != "auto":
                raise DynexportError(
                    f"kv_cache_dtype: expected {self.kv_cache_dtype} with the target onnxruntime only, found tensorrt"
                )
            rows = MAX_BATCH if self.max_batch is None else self.max_batch
            return TensorRT(precision, rows, self.max_prompt, plugins=self.plugins)
        only_tensorrt = {"max_batch": self.max_batch, "max_prompt": self.max_prompt}
        for option, given in only_tensorrt.items():
            if given is not None:
                raise DynexportError(
                    f"{option}: expected with the target tensorrt, found onnxruntime, which needs none"
                )
        symmetric = self.quantiser == "nearest"
        how: dict[str, Any] = {
            "zero_points": not symmetric,
            "head_bits": self.head_bits or 8,
            "kept": kept,
            "float_activations": float_activations,
        }
        if self.plugins:
            return PluggedOnnxRuntime(precision, segments, caches=self.kv_cache_dtype, **how)
        if self.kv_cache_dtype == "fp16":
            raise DynexportError(
                "kv_cache_dtype: expected fp16 with dynexport's operators (--plugins) only, as ONNX Runtime's own "
                "attention would compute in fp16 too; choose int8"
            )
        return OnnxRuntime(precision, segments, **how)

    def _check_int4(self) -> None:
        """Raise DynexportError for options of int4 weights without those, or with TensorRT, whose int4 is symmetric."""
        if self.head_bits is not None and (not is_integer(self.head_bits) or self.head_bits not in (8, 4)):
            raise DynexportError(f"head_bits: expected 8 or 4, found {shown(self.head_bits)}")
        for option, given in (("quantiser", self.quantiser != "auto"), ("head_bits", self.head_bits is not None)):
            if given and (self.precision, self.target) != ("int4", "onnxruntime"):
                raise DynexportError(
                    f"{option}: expected with precision int4 and the target onnxruntime only, found {self.precision} "
                    f"and {self.target}"
                )
        if self.sensitive is None:
            return
        if self.quantiser != "gptq":
            raise DynexportError(f"sensitive: expected with the quantiser gptq, found {self.quantiser}")
        if not is_number(self.sensitive) or not 0 < self.sensitive < 1:
            raise DynexportError(
                f"sensitive: expected a share of the weights above 0 and below 1, found {shown(self.sensitive)}"
            )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(TargetOptions):
    """All options of a conversion.

    Attributes:
        strategy: the name of a strategy; None for the one in config.json under "dynexport", else dense.
        speedups: the contract's speedups; empty for those of config.json.
        rule: the contract's rule for the layers to skip; None for that of config.json.
        keep: the indices of the kept layers, which override the rule; None for those of config.json.
        fields: new values for any fields of the contract, applied last; nested objects are merged field by field.
        max_length: the bundle's context in tokens; None for the model's, or with longrope for its original length.
        static: whether to write one graph of the kept layers per ratio, instead of one graph with conditions.
        layer_capacity: the share of a hop's tokens that every layer of a Radial Network has room for, in a single graph
            of all hops; None for the usual graphs.
        kv_cache_text: for int8 caches, the text that their scales are measured on, or its token ids; the first 4096
            tokens are used. None takes dynexport's own text.
        quantiser_text: for the quantiser gptq, the text that inputs are measured on, or its token ids; the first 4096
            tokens are used. None takes dynexport's own text.
        golden: whether to write golden vectors; they need torch and transformers.
        tokenizer: a tokenizer.json, or a directory with one, that replaces the model's own.
        importer: the name of the importer for a model that other routing code has written (docs/importing.md).
        adapter: a directory of the peft library with a LoRA adapter, which is merged into the weights
            (docs/adapters.md).
        progress: a function called with the name of the current work, the number of weights done, and their total
            number.
    """

    strategy: str | None = None
    speedups: Sequence[float] = ()
    rule: SkipRule | None = None
    keep: Sequence[int] | None = None
    fields: Mapping[str, Any] | None = None
    max_length: int | None = None
    static: bool = False
    layer_capacity: float | None = None
    kv_cache_text: str | Sequence[int] | None = None
    quantiser_text: str | Sequence[int] | None = None
    golden: bool = True
    tokenizer: Path | None = None
    importer: str | None = None
    adapter: str | Path | None = None
    progress: Progress | None = None

    def check_form(self) -> None:
        """Raise DynexportError for graph options that contradict each other or are out of range."""
        if self.kv_cache_text is not None and self.kv_cache_dtype in ("auto", "fp32", "fp16"):
            raise DynexportError(
                f"kv_cache_text: expected with kv_cache_dtype int8, found {self.kv_cache_dtype}, which has no scales"
            )
        if self.quantiser_text is not None and self.quantiser != "gptq":
            raise DynexportError(f"quantiser_text: expected with the quantiser gptq, found {self.quantiser}")
        share = self.layer_capacity
        if share is None:
            return
        if self.static:
            raise DynexportError("--static: expected without --single-graph, found both")
        if not is_number(share) or not 0 < share <= 1:
            raise DynexportError(f"layer capacity: expected a share above 0 and up to 1, found {shown(share)}")


__all__ = ["CALIBRATION_TOKENS", "ConvertOptions", "Progress", "TargetOptions"]
