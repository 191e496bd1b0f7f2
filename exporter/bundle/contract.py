"""The contract of a conversion: the checkpoint's declaration, overridden by the user's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.strategies import declared_contract, strategies
from dynexport.runtime.bundle.checks import checked_kind, checked_list, is_integer
from dynexport.runtime.bundle.contract import UNDECLARED, AnyContract, SkipRule, parse_contract
from dynexport.runtime.bundle.errors import DynexportError


def read_contract(
    checkpoint: Checkpoint,
    strategy: str | None = None,
    speedups: Sequence[float] = (),
    rule: SkipRule | None = None,
    keep: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> AnyContract:
    """Return the checkpoint's contract, overridden by the user's options; ``changes`` may set any field."""
    speedups = checked_list("speedups", speedups, "numbers")
    if keep is not None:  # numbers of numpy as plain ones, which is what a contract has
        keep = [int(layer) if is_integer(layer) else layer for layer in checked_list("keep", keep, "layers")]
    changes = {} if changes is None else changes
    checked_kind("fields", changes, Mapping, "a mapping of the contract's fields")
    declared = declared_contract(checkpoint.config)
    if declared is not None and not isinstance(declared, dict):
        raise DynexportError(f"{checkpoint.source}: config.json: dynexport: expected an object, found {declared!r}")
    name = strategy or (declared or {"strategy": UNDECLARED}).get("strategy")
    if not isinstance(name, str) or name not in strategies():
        known = " or ".join(strategies())
        raise DynexportError(f"{checkpoint.source}: strategy: expected {known}, found {name!r}")
    chosen = strategies()[name]
    if not chosen.has_ratios and (speedups or rule is not None or keep is not None):
        raise _no_ratios(checkpoint, name, "speedups" if speedups else "keep" if keep is not None else "rule")
    fields: dict[str, Any] = dict(declared) if declared and declared.get("strategy") == name else {"strategy": name}
    if speedups:
        fields["speedups"] = tuple(speedups)
        fields.pop("keep", None)
    if rule is not None:
        fields["rule"] = rule
        fields.pop("order", None)
    if keep is not None:
        fields["keep"] = tuple(keep)
    fields = merged(fields, changes)
    if fields["strategy"] != name:
        raise DynexportError(
            f"{checkpoint.source}: contract: strategy: expected {name} among the fields to set, found "
            f"{fields['strategy']!r:.80}; choose it with --strategy"
        )
    chosen.check_fields(fields, checkpoint)
    return parse_contract(fields, f"{checkpoint.source}: contract")


def _no_ratios(checkpoint: Checkpoint, strategy: str, field: str) -> DynexportError:
    option = f"--{field.removesuffix('s')}"
    expected = " or ".join(name for name, other in strategies().items() if other.has_ratios)
    return DynexportError(
        f"{checkpoint.source}: {option}: expected with the strategy {expected}, whose contract has {field}, found "
        f"{strategy}; add --strategy {expected}, or leave {option} out"
    )


def merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` overridden by ``changes``, nested objects field by field; names become strings, as in JSON."""
    result = {str(name): value for name, value in fields.items()}
    for name, change in changes.items():
        before = result.get(str(name))
        if isinstance(before, Mapping) and isinstance(change, Mapping):
            change = merged(before, change)
        result[str(name)] = change
    return result


__all__ = ["merged", "read_contract"]
