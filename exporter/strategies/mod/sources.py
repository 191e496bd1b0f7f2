"""Where the projections of queries, and of keys and values, come from where a layer has them apart."""

from __future__ import annotations

from dataclasses import replace

from dynexport.exporter.families.architecture import Architecture, Array, Source
from dynexport.runtime.bundle.contract import Mod


def with_queries_apart(architecture: Architecture, contract: Mod) -> Architecture:
    """Return the architecture with the sources of ``q_proj`` and ``kv_proj`` in routed layers."""
    queries = architecture.heads * architecture.head_dim
    sources = dict(architecture.sources)
    for layer in contract.routed_layers:
        for kind in ("weight", "bias") if architecture.qkv_bias else ("weight",):
            prefix = f"model.layers.{layer}.self_attn."
            packed = f"{prefix}qkv_proj.{kind}"
            first, rest = _halves(sources.get(packed, Source((packed,))), queries)
            sources |= {f"{prefix}q_proj.{kind}": first, f"{prefix}kv_proj.{kind}": rest}
    return replace(architecture, sources=sources)


def _halves(packed: Source, rows: int) -> tuple[Source, Source]:
    """Return the sources of a matrix's first rows and of the others."""
    if packed.combine is None and len(packed.names) == 3:
        return Source(packed.names[:1]), Source(packed.names[1:])
    moves_rows = packed.moves_rows or (packed.combine is None and len(packed.names) == 1)

    def part(rows: slice) -> Source:
        def cut(parts: list[Array]) -> Array:
            whole = Source(packed.names, packed.combine).build(dict(zip(packed.names, parts, strict=True)).__getitem__)
            return whole[rows]

        return Source(packed.names, cut, moves_rows)

    return part(slice(None, rows)), part(slice(rows, None))


__all__ = ["with_queries_apart"]
