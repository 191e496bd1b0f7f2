"""Check the sizes of a config.json against the tensors beside it, before anything is built from them."""

from __future__ import annotations

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.runtime.bundle.errors import DynexportError

# What families call them. A width is a dimension of some tensor, or divides one; a layer has a tensor at least.
_WIDTHS = (
    "hidden_size",
    "n_embd",
    "word_embed_proj_dim",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
)
_DEPTHS = ("num_hidden_layers", "n_layer")


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise DynexportError for a size that no tensor of the checkpoint has room for.

    A config of a few bytes could otherwise ask for a graph of billions of nodes. Whether a size is right is found when
    its tensors are read.
    """
    widest = max((size for name in checkpoint.names for size in checkpoint.shape(name)), default=0)
    _check(checkpoint, _WIDTHS, widest, "the largest dimension of its tensors")
    _check(checkpoint, _DEPTHS, len(checkpoint.names), "as it has tensors")


def _check(checkpoint: Checkpoint, names: tuple[str, ...], most: int, why: str) -> None:
    for name in names:
        value = checkpoint.config.get(name)
        if isinstance(value, int) and value > most:
            raise DynexportError(
                f"{checkpoint.source}: config.json: {name}: expected at most {most}, {why}, found {value}; use the "
                "config.json that was saved with the weights"
            )


__all__ = ["check_sizes"]
