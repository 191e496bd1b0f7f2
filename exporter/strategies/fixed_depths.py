"""Shared code of strategies whose depths are fixed sets of layers, the same for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.runtime.bundle.manifest import FULL, Depth, ProfileName, Program


def skipped_together(layers: Sequence[int], depths: Sequence[Depth]) -> tuple[tuple[int, ...], ...]:
    """Group layers that are in the same depths for prompts and decoding, whose caches have equal lengths."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for layer in layers:
        key = tuple(layer in run for depth in depths for run in (depth.keep, depth.prompt))
        groups.setdefault(key, []).append(layer)
    return tuple(tuple(group) for group in groups.values())


def plans_of_depths(
    depths: Sequence[Depth], layers: int, always: Sequence[int], *, conditional: bool
) -> tuple[GraphPlan, ...]:
    """Return the plans for depths that prompts may run at too: one graph with conditions, or a graph for each depth.

    Args:
        depths: the depths beside full depth.
        layers: number of layers.
        always: the layers of every depth.
        conditional: whether one graph with conditions serves all depths.
    """
    both: tuple[ProfileName, ...] = ("prefill", "decode")

    def plan(name: str, held: tuple[int, ...], serves: tuple[ProfileName, ...]) -> GraphPlan:
        together = skipped_together([layer for layer in held if layer not in always], depths)
        return GraphPlan(name, held, conditional, contiguous=tuple(always), together=together, serves=serves)

    everything = plan("model", tuple(range(layers)), both)
    if conditional:
        return (everything,)
    return (
        everything,
        *(plan(depth.name, depth.keep, both if depth.prompt == depth.keep else both[1:]) for depth in depths),
    )


def programs_of_depths(plans: Sequence[GraphPlan], depths: Sequence[Depth]) -> Iterator[Program]:
    """Yield the programs: a conditional graph runs all depths; else the first runs full depth, the others one each."""
    everything, *of_depths = plans
    yield Program(phase="prompt", graph=everything.name)
    yield Program(phase="decode", depth=None if everything.conditional else FULL, graph=everything.name)
    for depth, plan in zip(depths, of_depths, strict=False):
        if "prefill" in plan.serves:
            yield Program(phase="prompt", depth=depth.name, graph=plan.name)
        yield Program(phase="decode", depth=depth.name, graph=plan.name)


__all__ = ["plans_of_depths", "programs_of_depths", "skipped_together"]
