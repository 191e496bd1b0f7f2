"""The weights of a routed layer that a token reads only if it runs a part, or only if it skips it."""

from __future__ import annotations

from dynexport.exporter.strategies.strategy import CostPart
from dynexport.runtime.bundle.contract import Mod

_QUERIES = r"self_attn\.(q_proj|q_norm|o_proj)\..+"
_ATTENTION = r"self_attn\..+|input_layernorm\..+"
_MLP = r"mlp\..+|post_attention_layernorm\..+"
_ADAPTER = r"mod_adapter\..+"
_NOTHING = r"(?!)"


def cost_parts(contract: Mod) -> tuple[CostPart, ...]:
    """Return the weights of every decision; none where each is about a layer and its cache."""
    if contract.target == "block" and contract.skipped_kv == "none" and contract.skip_branch == "none":
        return ()
    attention = _QUERIES if contract.skipped_kv == "own" else _ATTENTION
    skip = _ADAPTER if contract.skip_branch == "adapter" else _NOTHING
    runs = {
        "block": ((f"{attention}|{_MLP}", skip),),
        "attention": ((attention, _NOTHING),),
        "mlp": ((_MLP, skip),),
        "attention+mlp": ((attention, _NOTHING), (_MLP, skip)),
    }[contract.target]
    return tuple(CostPart(layer, *parts) for layer in contract.routed_layers for parts in runs)


__all__ = ["cost_parts"]
