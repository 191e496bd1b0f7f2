"""Convert optimization profiles to input shapes, and choose the profile for a step."""

from __future__ import annotations

from collections.abc import Mapping

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph, Profile, TensorSpec

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]


def profile_shapes(graph: Graph) -> list[dict[str, ShapeRange]]:
    """Return, for every profile, the minimum, optimum and maximum shape of each dynamic input, by name.

    Raises:
        DynexportError: when a symbol has no range, or a range is not ascending.
    """
    dynamic = [spec for spec in graph.inputs if any(isinstance(dim, str) for dim in spec.shape)]
    if dynamic and not graph.profiles:
        raise DynexportError(
            f"graph {graph.name}: input {dynamic[0].name}: expected a profile for {list(dynamic[0].shape)}, found "
            "none; convert the model again"
        )
    for profile in graph.profiles:
        for symbol, (least, usual, greatest) in profile.ranges.items():
            if not least <= usual <= greatest:
                raise DynexportError(
                    f"graph {graph.name}: profile {profile.name}: {symbol}: expected least <= usual <= greatest, "
                    f"found {least}, {usual}, {greatest}"
                )
    return [{spec.name: _range(graph, profile, spec) for spec in dynamic} for profile in graph.profiles]


def profile_for(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Return the index of the narrowest profile that accepts a step.

    Args:
        graph: the graph's entry in the manifest.
        sizes: the step's sizes, by symbol; symbols that no profile limits are ignored.

    Raises:
        DynexportError: when no profile accepts it; it names the size and the range that the engine was built for.
    """
    fitting = [i for i, profile in enumerate(graph.profiles) if _misfit(profile, sizes) is None]
    if fitting:
        return min(fitting, key=lambda i: _widths(graph.profiles[i]))
    if not graph.profiles:
        return 0
    widest = max(graph.profiles, key=_widths)
    symbol, size = _misfit(widest, sizes) or ("", 0)
    least, _, greatest = widest.ranges[symbol]
    raise DynexportError(
        f"graph {graph.name}: {symbol}: expected {least} to {greatest}, which profile {widest.name} was built for, "
        f"found {size}; convert with wider profiles and build again"
    )


def profiles_text(profiles: tuple[Profile, ...]) -> str:
    """Return profiles as text, such as "prefill B 1-4 S 1-512; decode B 1-4 S 1"."""
    return "; ".join(
        f"{profile.name} " + " ".join(_range_text(symbol, *sizes) for symbol, sizes in profile.ranges.items())
        for profile in profiles
    )


def _range(graph: Graph, profile: Profile, spec: TensorSpec) -> ShapeRange:
    for dim in spec.shape:
        if isinstance(dim, str) and dim not in profile.ranges:
            raise DynexportError(
                f"graph {graph.name}: profile {profile.name}: input {spec.name}: expected a range of {dim}, found none"
            )
    least, usual, greatest = (
        tuple(profile.ranges[dim][i] if isinstance(dim, str) else dim for dim in spec.shape) for i in range(3)
    )
    return least, usual, greatest


def _misfit(profile: Profile, sizes: Mapping[str, int]) -> tuple[str, int] | None:
    for symbol, (least, _, greatest) in profile.ranges.items():
        if symbol in sizes and not least <= sizes[symbol] <= greatest:
            return symbol, sizes[symbol]
    return None


def _widths(profile: Profile) -> int:
    product = 1
    for least, _, greatest in profile.ranges.values():
        product *= greatest - least + 1
    return product


def _range_text(symbol: str, least: int, usual: int, greatest: int) -> str:
    return f"{symbol} {least}" if least == greatest else f"{symbol} {least}-{greatest}"
