"""The check for checkpoint tensors that a conversion does not read: an error, or a note if the user left them out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from dynexport.exporter.bundle.weights import HEAD, WeightReader
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.contract import AnyContract
from dynexport.runtime.bundle.errors import DynexportError

# Constants that transformers 4 stored and computes today.
_ROTARY_TABLES = r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
_SHOWN = 6


def check_leftovers(
    reader: WeightReader, needed: Collection[str], contract: AnyContract, *, chosen: bool = False, changed: bool = False
) -> tuple[str, ...]:
    """Check by name that the graphs use every tensor of the checkpoint, before any is read.

    Masks, rotary tables and a second copy of a tied head may be left. So may the routers of another strategy than
    the one that the user has chosen, and those that a contract changed by the user leaves out; a note names them.

    Args:
        needed: names of the tensors that the graphs are made from.
        contract: what was converted.
        chosen: whether the user has named the strategy.
        changed: whether the user has changed fields of the contract.

    Returns:
        One line for every reason to leave tensors out.

    Raises:
        DynexportError: naming tensors that have no reason to be left out.
    """
    strategy = strategies()[contract.strategy]
    allowed = [_ROTARY_TABLES, reader.family.masks]
    if reader.architecture.tied_embeddings:
        allowed += map(re.escape, reader.stored_names(HEAD))
    reasons = dict(strategy.unused(contract))
    if chosen:
        others = (other for other in strategies().values() if other is not strategy and other.tensors)
        reasons |= {other.tensors: f"--strategy {strategy.name} was asked for" for other in others}
    if changed and strategy.tensors:
        reasons[strategy.tensors] = "the contract that was asked for does not use them"
    left = sorted(set(reader.checkpoint.names).difference(needed))
    left = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in allowed)]
    notes = []
    for pattern, reason in reasons.items():
        named = [name for name in left if re.fullmatch(pattern, name)]
        left = [name for name in left if name not in named]
        if named:
            notes.append(f"left out: {_listed(named)}; {reason}")
    if left:
        raise DynexportError(
            f"{reader.checkpoint.source}: expected no tensors but those of a {reader.family.model_type} as config.json "
            f"describes it, found {_listed(left)}; {_advice(left)}"
        )
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name:.120}" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _advice(names: Iterable[str]) -> str:
    for strategy in strategies().values():
        if strategy.tensors and all(re.fullmatch(strategy.tensors, name) for name in names):
            return (
                f"they are routers of {strategy.name}: declare all of them, in config.json under dynexport or with "
                "--set, or leave them out on purpose with --strategy dense"
            )
    return (
        "a bundle without them would compute something else: merge adapters into the weights, name the code that wrote "
        "routers with --import, and correct config.json or take the tensors out if they belong to something else"
    )
