"""The sizes of a bundle's KV cache buffers."""

from __future__ import annotations

from dynexport.runtime.bundle.manifest import Cache, CachePart, Manifest


class CacheLayout:
    """The KV caches of all places, and their sizes for rows of a given number of tokens.

    Attributes:
        caches: caches in the order of places, from 0.
        fixed: whether the graphs fix the number of slots; then every row has all of them from the start.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.caches: list[Cache] = sorted(manifest.caches, key=lambda cache: cache.place)
        self.fixed = all(part.shape[2] != "M" for cache in self.caches for part in with_heads(cache))

    @property
    def places(self) -> int:
        """The number of caches of a row."""
        return len(self.caches)

    def slots(self, place: int, tokens: int) -> int:
        """Return the number of slots that a row of ``tokens`` tokens has in one place, slack included."""
        cache = self.caches[place]
        for fixed in {part.shape[2] for part in with_heads(cache)}:
            if isinstance(fixed, int):
                return fixed
        return min(tokens, cache.most or tokens) * cache.per_token + cache.slack

    def shapes(self, place: int, rows: int, slots: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every part of one place's cache, for a number of rows and slots."""
        sizes = {"B": rows, "M": slots}
        return {
            name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in part.shape)
            for name, part in self.caches[place].parts.items()
        }


def with_heads(cache: Cache) -> tuple[CachePart, ...]:
    """Return the keys and the values of a cache; nothing for a layer without attention."""
    return tuple(cache.parts[name] for name in ("key", "value") if name in cache.parts)


__all__ = ["CacheLayout", "with_heads"]
