"""Check the sizes of a config.json against the tensors beside it, before anything is built from them."""

from __future__ import annotations

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.runtime.bundle.errors import DynexportError

# Names of widths and depths in all families. A width is at most a tensor's dimension; a layer has at least one tensor.
_WIDTHS = (
    "hidden_size",
    "n_embd",
    "model_dim",
    "word_embed_proj_dim",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
)
_DEPTHS = ("num_hidden_layers", "num_transformer_layers", "n_layer", "n_layers")


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise DynexportError for a size that is too large for the checkpoint's tensors.

    Otherwise a config of a few bytes could ask for a graph of billions of nodes. Exact shapes are checked later, when
    the tensors are read.
    """
    widest = max((size for name in checkpoint.names for size in checkpoint.shape(name)), default=0)
    _check(checkpoint, _WIDTHS, widest, "the largest dimension of the tensors")
    _check(checkpoint, _DEPTHS, len(checkpoint.names), "the number of tensors")


def _check(checkpoint: Checkpoint, names: tuple[str, ...], most: int, why: str) -> None:
    for name in names:
        value = checkpoint.config.get(name)
        if isinstance(value, int) and value > most:
            raise DynexportError(
                f"{checkpoint.source}: config.json: {name}: expected at most {most}, {why}, found {value}; use the "
                "config.json that was saved with the weights"
            )


__all__ = ["check_sizes"]
