"""How large the buffers of a bundle's KV caches are."""

from __future__ import annotations

from dynexport.runtime.bundle.manifest import Cache, CachePart, Manifest


class CacheLayout:
    """The caches of every place, sized for rows of some tokens.

    Attributes:
        caches: by place, 0 and up.
        fixed: whether the number of slots stands in the graphs: then rows have all of them from the beginning.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.caches: list[Cache] = sorted(manifest.caches, key=lambda cache: cache.place)
        self.fixed = all(part.shape[2] != "M" for cache in self.caches for part in _with_heads(cache))

    @property
    def places(self) -> int:
        """How many caches a row has."""
        return len(self.caches)

    def slots(self, place: int, tokens: int) -> int:
        """Return how many slots a row of some tokens has in a place, slack included."""
        cache = self.caches[place]
        (fixed,) = {part.shape[2] for part in _with_heads(cache)}
        if isinstance(fixed, int):
            return fixed
        return min(tokens, cache.most or tokens) * cache.per_token + cache.slack

    def shapes(self, place: int, rows: int, slots: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every part of a place's cache, for so many rows and slots."""
        sizes = {"B": rows, "M": slots}
        return {
            name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in part.shape)
            for name, part in self.caches[place].parts.items()
        }


def _with_heads(cache: Cache) -> tuple[CachePart, CachePart]:
    return cache.parts["key"], cache.parts["value"]


__all__ = ["CacheLayout"]
