"""What the residual blocks of a decoder layer add to the residual stream, read from transformers' own modules.

With x the hidden states before a layer, a sequential layer leaves x + A(x) + M(x + A(x)), a parallel one
x + A(x) + M(x). A and M are outputs of modules of the layer, whatever norm, gate or bias belongs to them: this is all
that has to be known of a family, and the sum is checked in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dynexport.exporter.reference.transformers_layers import Call, DecoderLayers, tested_version
from dynexport.runtime.bundle.errors import DynexportError


@dataclass(frozen=True)
class Blocks:
    """Where a family's layer computes its contributions.

    Attributes:
        attention, mlp: the modules of a layer whose outputs are added to the residual stream, by the names that
            checkpoints have for their tensors.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"


# Those that are not like llama.
_BLOCKS = {
    "gpt2": Blocks("attn"),
    "gpt_neox": Blocks("attention"),
    "opt": Blocks(mlp="fc2"),
    # The modules around these add the residual themselves.
    "bloom": Blocks("self_attention.dense", "mlp.dense_4h_to_h"),
    # Norms stand behind attention and MLP.
    "gemma2": Blocks("post_attention_layernorm", "post_feedforward_layernorm"),
}
# Of the largest hidden state: so much may the order of float32 additions change a sum, and a wrong module far more.
_TOLERANCE = 1e-3


def blocks_of(family: str) -> Blocks:
    """Of a ``model_type``; one without an entry is taken to be like llama, and ``Reader`` finds out where it is not."""
    return _BLOCKS.get(family, Blocks())


class Reader:
    """Reads contributions while layers run.

    Args:
        blocks: of the family.
        source: of the checkpoint, for messages.
    """

    def __init__(self, blocks: Blocks, source: str) -> None:
        self._blocks, self._source = blocks, source

    def run(self, index: int, layer: Any, before: Any, call: Call) -> tuple[Any, Any, Any]:
        """Run a layer over its input.

        Args:
            index: of the layer, for messages.
            layer: transformers' module, its weights in memory.
            before: hidden states [rows, length, hidden].
            call: what the model passes to the layer, these hidden states among it.

        Returns:
            Hidden states after the layer, A and M, each float32 [rows, length, hidden].

        Raises:
            DynexportError: when hidden states are not finite, or A and M cannot be read.
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
        """Within, the outputs of both modules come into what is yielded, by name."""
        outputs: dict[str, Any] = {}

        def keep(name: str) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                outputs[name] = output[0] if isinstance(output, tuple) else output

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
            raise self._unreadable(index, f"layer leaves something else, off by {error:.2g}")

    def _unreadable(self, index: int, found: str) -> DynexportError:
        return DynexportError(
            f"{self._source}: layer {index}: expected a layer that adds {self._blocks.attention} and "
            f"{self._blocks.mlp} to the residual stream, found that transformers' {found}; {tested_version()}, or "
            "correct config.json"
        )
