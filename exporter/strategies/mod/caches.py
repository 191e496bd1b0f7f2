"""How many slots the caches of routed layers have."""

from __future__ import annotations

from dynexport.exporter.lowering.plan import PADDED_CHUNK
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.manifest import RoutedCaches


def routed_caches(contract: Mod, max_length: int, *, padded: bool) -> RoutedCaches:
    """The slots of a routed layer's cache, and what a step on filled caches needs.

    A padded step writes as many entries as it has room for, chosen or not: on a filled cache that needs slack.
    """
    slots = contract.slots(max_length)
    if not padded:
        return RoutedCaches(layers=contract.routed_layers, slots=slots, slack=1, chunk=None)
    if contract.prefill == "topk":  # such a prompt cannot be cut
        return RoutedCaches(layers=contract.routed_layers, slots=slots, slack=slots, chunk=None)
    chunk = min(slots, PADDED_CHUNK)
    return RoutedCaches(layers=contract.routed_layers, slots=slots, slack=chunk, chunk=chunk)


__all__ = ["routed_caches"]
