"""Refuse, by name, the contracts that no graph can be written for."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.lowering.target import Target
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError


def check_supported(contract: Mod, architecture: Architecture, target: Target) -> None:
    """Raise DynexportError for a contract whose layers the family or the target has no form for."""
    in_parts = contract.target != "block" or contract.skipped_kv == "own" or contract.skip_branch == "adapter"
    in_parts = in_parts or contract.gate in ("split", "affine")
    a = architecture
    plain = a.experts is None and a.residual == "sequential" and a.norm == "rms" and a.pre_norms and not a.post_norms
    if in_parts and not (plain and a.residual_scale is None):
        raise DynexportError(
            "mod: expected a family with attention and one MLP in sequence, an RMSNorm before each, to skip parts of "
            f"its layers, found {a.family}"
        )
    if contract.skipped_kv == "own" and target.cache_head_dim(a.head_dim) != a.head_dim:
        raise DynexportError(
            f"skipped_kv: expected none for heads of {a.head_dim} channels, which caches pad, found own"
        )
    if not target.conditional_layers:
        check_without_conditions(contract, target.title)


def check_without_conditions(contract: Mod, what: str) -> None:
    """Raise DynexportError for a contract that only graphs with attention under conditions have.

    Without conditions a layer gathers a fixed number of tokens, what its cache has room for. Parts of layers have no
    such number: a graph would compute every token, and save nothing.
    """
    wrong = {
        "target": (contract.target in ("mlp", "attention+mlp"), "nothing bounds the tokens that run the MLP"),
        "skipped_kv": (contract.skipped_kv == "own", "here every token has an entry"),
        "skip_branch": (contract.skip_branch == "adapter", "nothing bounds the tokens that take the branch"),
        "level": (contract.level == "sequence", "a sequence runs with all of its tokens or none"),
    }
    for name, (found, why) in wrong.items():
        if found:
            raise DynexportError(
                f"{name}: expected {Mod.model_fields[name].default} for {what}, whose layers gather as many tokens as "
                f"their caches have room for, found {getattr(contract, name)}: {why}, so that all would be computed; "
                "convert for ONNX Runtime without --static"
            )
    if contract.router.kind != "linear" and what != "--static":
        raise DynexportError(f"router.kind: expected linear for {what}, found {contract.router.kind}")


__all__ = ["check_supported", "check_without_conditions"]
