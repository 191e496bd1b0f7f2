"""How large the caches of layers that choose their tokens are."""

from __future__ import annotations

from dataclasses import dataclass

from dynexport.exporter.lowering.plan import PADDED_CHUNK
from dynexport.runtime.bundle.contract import AnyContract, Mod


@dataclass(frozen=True)
class RoutedCaches:
    """The caches of layers that choose their tokens.

    Attributes:
        layers: those layers, ascending.
        slots: entries that a row may have there.
        slack: further slots, which a step may fill with what is never read.
        chunk: most tokens that a step may have while the caches hold entries; None for any number.
    """

    layers: tuple[int, ...]
    slots: int
    slack: int
    chunk: int | None


def routed_caches(contract: AnyContract, max_length: int, *, padded: bool) -> RoutedCaches | None:
    """What layers that choose their tokens have for a cache.

    A padded step writes as many entries as it has room for, chosen or not: on a filled cache that needs slack.
    """
    if not isinstance(contract, Mod):
        return None
    slots = contract.slots(max_length)
    if not padded:
        return RoutedCaches(layers=contract.routed_layers, slots=slots, slack=1, chunk=None)
    if contract.prefill == "topk":  # such a prompt cannot be cut
        return RoutedCaches(layers=contract.routed_layers, slots=slots, slack=slots, chunk=None)
    chunk = min(slots, PADDED_CHUNK)
    return RoutedCaches(layers=contract.routed_layers, slots=slots, slack=chunk, chunk=chunk)
