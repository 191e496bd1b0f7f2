"""Describe Mixture-of-Depths routing for ``convert`` and ``inspect``."""

from __future__ import annotations

from dynexport.runtime.bundle.contract import Mod


def describe(contract: Mod) -> list[tuple[str, str]]:
    """Return names and values: the trained share of tokens, the causal rule and the rule for prompts."""
    decision = contract.decision
    share = f"{contract.capacity:.4g} of the tokens, rounded by {contract.rounding}"
    if decision.rule == "always":
        rule = "always: every token runs"
    else:
        thresholds = {layer: contract.threshold(layer) for layer in contract.routed_layers}
        shown = " ".join(f"{value:.4g}" for value in dict.fromkeys(thresholds.values()))
        if len(set(thresholds.values())) > 1:
            shown = ", ".join(f"{value:.4g} in layer {layer}" for layer, value in thresholds.items())
        rule = f"{decision.rule}, probability {decision.comparison} {shown}"
    return [
        ("capacity", share),
        ("decision", rule),
        ("prompts", "routed by the same rule" if contract.prefill == "causal" else "top-k: the capacity's best tokens"),
    ]


__all__ = ["describe"]
