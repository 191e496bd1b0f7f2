"""The numbers of slots of routed layers' caches."""

from __future__ import annotations

from dynexport.exporter.lowering.plan import PADDED_CHUNK, SlotRule
from dynexport.runtime.bundle.contract import Mod


def routed_slots(contract: Mod, max_length: int, *, padded: bool) -> SlotRule:
    """Return the rule for the entries and slots of a routed layer's cache.

    A padded call writes a fixed number of entries, chosen or not, so a full cache needs slack behind its entries.
    """
    slots = contract.slots(max_length)
    if not padded:
        return SlotRule(most=slots, slack=1)
    whole = contract.prefill == "topk"  # such a prompt runs in one call
    return SlotRule(most=slots, slack=slots if whole else min(slots, PADDED_CHUNK))


def filled_chunk(contract: Mod, max_length: int, *, padded: bool) -> int | None:
    """Return the largest number of a row's tokens in a call on filled caches; None for any number."""
    if not padded or contract.prefill == "topk":
        return None
    return routed_slots(contract, max_length, padded=True).slack


__all__ = ["filled_chunk", "routed_slots"]
