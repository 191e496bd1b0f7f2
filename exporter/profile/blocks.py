"""Read the contributions of attention and MLP to the residual stream from transformers' own modules.

Let x be the hidden states before a layer. A sequential layer returns x + A(x) + M(x + A(x)), a parallel layer
x + A(x) + M(x). A and M are outputs of two modules of the layer and include their norms, gates and biases; a family may
multiply them first (granite). The names of these modules and the multiplier are all that is needed of a family; the sum
is checked in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.transformers_layers import DecoderLayers, tested_version
from dynexport.runtime.bundle.errors import DynexportError


@dataclass(frozen=True)
class Blocks:
    """The modules of a family's layer whose outputs are added to the residual stream.

    Attributes:
        attention: the attention module's name within the layer, as in tensor names of checkpoints.
        mlp: the MLP module's name, likewise.
        scale: multiplies the outputs of both.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    scale: float = 1.0


# Families that differ from llama.
_BLOCKS = {
    "gpt2": Blocks("attn"),
    "gpt_neox": Blocks("attention"),
    "opt": Blocks(mlp="fc2"),
    # In bloom the enclosing modules add the residual.
    "bloom": Blocks("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt_bigcode": Blocks("attn"),
    "gptj": Blocks("attn"),
    "codegen": Blocks("attn"),
    "falcon": Blocks("self_attention"),
    "openelm": Blocks("attn", "ffn"),
    "granitemoe": Blocks(mlp="block_sparse_moe"),
    # Norms follow attention and MLP.
    "ouro": Blocks("input_layernorm_2", "post_attention_layernorm_2"),
    "gemma2": Blocks("post_attention_layernorm", "post_feedforward_layernorm"),
    "exaone4": Blocks("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": Blocks("post_self_attn_layernorm", "post_mlp_layernorm"),
    "gemma3_text": Blocks("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": Blocks("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": Blocks("post_attention_layernorm", "post_feedforward_layernorm"),
}
# Share of the largest hidden state. The order of float32 additions changes a sum by less, a wrong module by far more.
_TOLERANCE = 1e-3


def blocks_of(architecture: Architecture) -> Blocks:
    """Return the blocks of a family; the default is llama's, and ``Reader`` checks that it fits."""
    return replace(_BLOCKS.get(architecture.family, Blocks()), scale=architecture.residual_scale or 1.0)


class Reader:
    """Reads the contributions of attention and MLP while layers run.

    Args:
        blocks: the family's blocks.
        source: the checkpoint's source, for messages.
    """

    def __init__(self, blocks: Blocks, source: str) -> None:
        self._blocks, self._source = blocks, source

    def run(self, index: int, layer: Any, before: Any, call: Call) -> tuple[Any, Any, Any]:
        """Run a layer and return its output and contributions.

        Args:
            index: the layer's number, for messages.
            layer: transformers' module, its weights in memory.
            before: hidden states [rows, length, hidden].
            call: the arguments that the model passes to the layer, including ``before``.

        Returns:
            Hidden states after the layer, A and M, each float32 [rows, length, hidden].

        Raises:
            DynexportError: if hidden states are not finite, or A and M cannot be read.
        """
        with self._hooked(index, layer) as outputs:
            after = DecoderLayers.run(layer, call)
        for name in (self._blocks.attention, self._blocks.mlp):
            if name not in outputs:
                raise self._unreadable(index, f"layer does not call its module {name}")
        # opt's MLP runs over [rows * length, hidden].
        attention, mlp = (outputs[name].view_as(before) for name in (self._blocks.attention, self._blocks.mlp))
        self._check(index, before, after, attention, mlp)
        return after, attention, mlp

    @contextmanager
    def _hooked(self, index: int, layer: Any) -> Iterator[dict[str, Any]]:
        """Yield a dict that collects the outputs of both modules by name while the context is open."""
        outputs: dict[str, Any] = {}

        def keep(name: str) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                # A copy, as falcon adds to the MLP's output in place.
                outputs[name] = (output[0] if isinstance(output, tuple) else output) * self._blocks.scale

            return hook

        try:
            modules = {name: layer.get_submodule(name) for name in (self._blocks.attention, self._blocks.mlp)}
        except AttributeError as error:
            raise self._unreadable(index, f"layer has no such module: {error}") from error
        hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, index: int, before: Any, after: Any, attention: Any, mlp: Any) -> None:
        if not after.isfinite().all():
            raise DynexportError(
                f"{self._source}: layer {index}: expected finite hidden states, found infinite ones or NaN; "
                "check the weights"
            )
        error = (before + attention + mlp - after).abs().max()
        if error > _TOLERANCE * after.abs().max():
            raise self._unreadable(index, f"layer returns another sum, off by {error:.2g}")

    def _unreadable(self, index: int, found: str) -> DynexportError:
        return DynexportError(
            f"{self._source}: layer {index}: expected a layer that adds {self._blocks.attention} and "
            f"{self._blocks.mlp} to the residual stream, found that transformers' {found}; {tested_version()}, or "
            "correct config.json"
        )
