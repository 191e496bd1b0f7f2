"""How many slots the caches of routed layers have."""

from __future__ import annotations

from dynexport.exporter.lowering.plan import PADDED_CHUNK, SlotRule
from dynexport.runtime.bundle.contract import Mod


def routed_slots(contract: Mod, max_length: int, *, padded: bool) -> SlotRule:
    """The entries and slots of a routed layer's cache.

    A padded step writes as many entries as it has room for, chosen or not: on a filled cache that needs slack.
    """
    slots = contract.slots(max_length)
    if not padded:
        return SlotRule(most=slots, slack=1)
    whole = contract.prefill == "topk"  # such a prompt cannot be cut
    return SlotRule(most=slots, slack=slots if whole else min(slots, PADDED_CHUNK))


def filled_chunk(contract: Mod, max_length: int, *, padded: bool) -> int | None:
    """The most tokens of a row that a step on filled caches may have; None for any number."""
    if not padded or contract.prefill == "topk":
        return None
    return routed_slots(contract, max_length, padded=True).slack


__all__ = ["filled_chunk", "routed_slots"]
