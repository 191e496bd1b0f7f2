"""What a trace says: the tokens of one generation, the layers that each ran in, and what routers made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.execution.decoders import AnyCache
from dynexport.runtime.execution.routes import RowLog
from dynexport.runtime.text.text import StreamDecoder, Text

Array = np.ndarray
# Of one routed layer, a number for every token; None where it is NaN or infinite, which JSON does not have.
Numbers = tuple[float | None, ...]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Token(_Part):
    """A token that was processed. The last one that a generation makes never is.

    Attributes:
        text: what it adds to the text: nothing where it ends within a character; None without a tokenizer.
        is_prompt: whether it was given; otherwise it was generated and fed back.
    """

    id: int
    text: str | None
    is_prompt: bool

    @classmethod
    def sequence(cls, ids: Sequence[int], text: Text, prompt_tokens: int) -> tuple[Token, ...]:
        """All tokens of a row, of which so many are its prompt; together their texts are the text."""
        texts: list[str | None] = [None] * len(ids)
        if text.has_tokenizer and ids:
            decoder = StreamDecoder(text, skip_special_tokens=False)
            pieces = [decoder.push(token) for token in ids]
            texts = [*pieces[:-1], pieces[-1] + decoder.finish()]
        parts = enumerate(zip(ids, texts, strict=True))
        return tuple(cls(id=token, text=piece, is_prompt=i < prompt_tokens) for i, (token, piece) in parts)


class RoutedLayer(_Part):
    """What a layer that chooses its tokens came to.

    Attributes:
        rate: share of the row's tokens that ran in it.
        overflow: tokens that it chose and had no room for; they did not run.
    """

    layer: int
    rate: float
    overflow: int


class Depth(_Part):
    """How deep a row went, as its cache counts it; nothing has to be recorded for that.

    Attributes:
        tokens: how many were processed, the prompt's and those fed back.
        layers: of the model.
        layers_per_token: the mean.
        turned_away: how often a full layer turned a token away that was on a path of its own.
    """

    tokens: int
    layers: int
    layers_per_token: float
    routed: tuple[RoutedLayer, ...]
    turned_away: int = 0

    @classmethod
    def of(cls, cache: AnyCache, manifest: Manifest) -> Depth:
        """Of a cache of one row that has seen at least one token."""
        tokens, entries = int(cache.positions[0]), cache.lengths[:, 0]
        routed = manifest.routed.layers if manifest.routed else ()
        return cls(
            tokens=tokens,
            layers=manifest.model.layers,
            layers_per_token=float(entries.sum() / tokens),
            routed=tuple(
                RoutedLayer(layer=layer, rate=float(entries[layer] / tokens), overflow=int(overflow))
                for layer, overflow in zip(routed, cache.overflow[: len(routed), 0], strict=True)
            ),
            turned_away=0 if routed else int(cache.overflow[:, 0].sum()),
        )


class Trace(_Part):
    """Tokens against layers.

    Attributes:
        speedup: the ratio's name.
        layers: of the model.
        ran: [layers][tokens].
        depth: [tokens], layers run; not simply a sum of ``ran``, as a token may take a layer more than once.
        paths: [tokens], the layers that each took, in that order; none where all take them from the first to the last.
        routed: R of them, ascending; none where no layer chooses.
        scores, margins: [R][tokens], the routers' scores, and how far each decision was from the other one.
    """

    strategy: str
    speedup: str
    layers: int
    tokens: tuple[Token, ...]
    ran: tuple[tuple[bool, ...], ...]
    depth: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    routed: tuple[RoutedLayer, ...]
    scores: tuple[Numbers, ...]
    margins: tuple[Numbers, ...]

    @classmethod
    def from_log(cls, log: RowLog, tokens: Sequence[Token], depth: Depth, *, strategy: str, speedup: str) -> Trace:
        """Of a recorded row.

        Args:
            log: what the cache recorded of it.
            tokens: as many as the log has, at least one.
            depth: of the same row.
        """
        ran = np.concatenate(log.ran, axis=1)
        if ran.shape != (depth.layers, len(tokens)):
            raise ValueError(f"log: expected {depth.layers} layers and {len(tokens)} tokens, found {ran.shape}")
        paths = _paths(log, depth.layers)
        return cls(
            strategy=strategy,
            speedup=speedup,
            layers=depth.layers,
            tokens=tuple(tokens),
            ran=tuple(map(tuple, ran.tolist())),
            depth=tuple(map(len, paths)) if paths else tuple(ran.sum(0).tolist()),
            paths=paths,
            routed=depth.routed,
            scores=_rows(log.scores if depth.routed else ()),
            margins=_rows(log.margins if depth.routed else ()),
        )

    @property
    def prompt_tokens(self) -> int:
        """How many tokens were given."""
        return sum(token.is_prompt for token in self.tokens)

    @property
    def layers_per_token(self) -> float:
        """The mean depth."""
        return sum(self.depth) / len(self.depth)


def _paths(log: RowLog, layers: int) -> tuple[tuple[int, ...], ...]:
    """Of every token, the layers that it took."""
    if not log.paths:
        return ()
    steps = np.concatenate(log.paths, axis=1).T.tolist()
    return tuple(tuple(layer for layer in path if 0 <= layer < layers) for path in steps)


def _rows(steps: Sequence[Array]) -> tuple[Numbers, ...]:
    rows: list[list[float]] = np.concatenate(steps, axis=1).tolist() if steps else []
    return tuple(tuple(value if math.isfinite(value) else None for value in row) for row in rows)


__all__ = ["Depth", "RoutedLayer", "Token", "Trace"]
