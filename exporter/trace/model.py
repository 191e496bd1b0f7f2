"""The data of a trace: the tokens of one generation, the layers each ran in, and the routers' scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.runtime.bundle.manifest import LayerRouting, PathRouting
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.text.text import StreamDecoder, Text

Array = np.ndarray
# One number per token for a routed layer; None for NaN and infinity, which JSON lacks.
Numbers = tuple[float | None, ...]
Routing = LayerRouting | PathRouting | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Token(_Part):
    """A processed token; the last token of a generation is not processed.

    Attributes:
        id: the token id.
        text: the text that the token adds; empty if it ends within a character, None without a tokenizer.
        is_prompt: whether the token is from the prompt; otherwise it was generated and fed back.
    """

    id: int
    text: str | None
    is_prompt: bool

    @classmethod
    def sequence(cls, ids: Sequence[int], text: Text, prompt_tokens: int) -> tuple[Token, ...]:
        """Return a row's tokens, the first ``prompt_tokens`` from the prompt; their texts join to the row's text."""
        texts: list[str | None] = [None] * len(ids)
        if text.has_tokenizer and ids:
            decoder = StreamDecoder(text, skip_special_tokens=False)
            pieces = [decoder.push(token) for token in ids]
            texts = [*pieces[:-1], pieces[-1] + decoder.finish()]
        parts = enumerate(zip(ids, texts, strict=True))
        return tuple(cls(id=token, text=piece, is_prompt=i < prompt_tokens) for i, (token, piece) in parts)


class RoutedLayer(_Part):
    """The figures of one routed layer.

    Attributes:
        layer: the layer's number.
        rate: share of the row's tokens that ran in the layer.
        overflow: number of tokens that the router chose but that exceeded the capacity; they did not run.
    """

    layer: int
    rate: float
    overflow: int


class RowDepth(_Part):
    """The depth of the tokens of a row.

    Attributes:
        tokens: number of processed tokens, from the prompt and fed back.
        layers: number of layers of the model.
        layers_per_token: mean depth.
        routed: the figures of each routed layer.
        turned_away: number of hops in which a full layer did not accept a token; 0 with routed layers.
    """

    tokens: int
    layers: int
    layers_per_token: float
    routed: tuple[RoutedLayer, ...]
    turned_away: int = 0

    @classmethod
    def of(cls, decisions: Decisions, routing: Routing) -> RowDepth:
        """Summarise the decisions of a row with at least one token."""
        layers, tokens = decisions.ran.shape
        taken = [len(path) for path in _paths(decisions, routing)] or decisions.ran.sum(axis=0)
        routed: tuple[RoutedLayer, ...] = ()
        if isinstance(routing, LayerRouting):
            about = map(routing.layer_of, range(routing.decisions))
            told = zip(about, decisions.choices == 1, decisions.overflow, strict=True)
            routed = tuple(
                RoutedLayer(layer=layer, rate=float(ran.mean()), overflow=int(overflow))
                for layer, ran, overflow in told
            )
        return cls(
            tokens=tokens,
            layers=layers,
            layers_per_token=float(np.mean(taken)),
            routed=routed,
            turned_away=0 if routed else int(decisions.overflow.sum()),
        )


class Trace(_Part):
    """The layers in which each token of a row ran, with the routers' scores.

    Attributes:
        strategy: the strategy's name.
        speedup: the depth's name: "2", "keep", "full".
        layers: number of layers of the model.
        tokens: the processed tokens.
        ran: [layers][tokens], whether the token ran in the layer.
        depth: [tokens], number of layers run; a layer counts each time that a token takes it.
        paths: [tokens], the layers of each token in order; empty if all tokens take the layers in the model's order.
        routed: the R decisions about a token by their layers, ascending; empty without routed layers.
        scores: [R][tokens], the routers' scores.
        margins: [R][tokens], distance of each score from the opposite decision.
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
    def of(
        cls, decisions: Decisions, routing: Routing, tokens: Sequence[Token], *, strategy: str, speedup: str
    ) -> Trace:
        """Return the trace of a row's decisions.

        Args:
            decisions: the decisions of at least one token.
            routing: the bundle's routing.
            tokens: the tokens of the decisions, in order.
            strategy: the strategy's name.
            speedup: the depth's name.

        Raises:
            ValueError: if ``tokens`` and ``decisions`` differ in length.
        """
        layers = len(decisions.ran)
        if decisions.ran.shape[1] != len(tokens):
            raise ValueError(f"decisions: expected {len(tokens)} tokens, found {decisions.ran.shape[1]}")
        paths, chosen = _paths(decisions, routing), isinstance(routing, LayerRouting)
        return cls(
            strategy=strategy,
            speedup=speedup,
            layers=layers,
            tokens=tuple(tokens),
            ran=tuple(map(tuple, decisions.ran.tolist())),
            depth=tuple(map(len, paths)) if paths else tuple(decisions.ran.sum(axis=0).tolist()),
            paths=paths,
            routed=RowDepth.of(decisions, routing).routed,
            scores=_numbers(decisions.scores) if chosen else (),
            margins=_numbers(decisions.margins) if chosen else (),
        )

    @property
    def prompt_tokens(self) -> int:
        """Return the number of prompt tokens."""
        return sum(token.is_prompt for token in self.tokens)

    @property
    def layers_per_token(self) -> float:
        """Return the mean depth."""
        return sum(self.depth) / len(self.depth)


def _paths(decisions: Decisions, routing: Routing) -> tuple[tuple[int, ...], ...]:
    """Return the layers that each token took; empty without path routing."""
    if not isinstance(routing, PathRouting):
        return ()
    layers = len(decisions.ran)
    return tuple(tuple(layer for layer in path if 0 <= layer < layers) for path in decisions.choices.T.tolist())


def _numbers(values: Array) -> tuple[Numbers, ...]:
    return tuple(tuple(value if math.isfinite(value) else None for value in row) for row in values.tolist())


__all__ = ["RoutedLayer", "RowDepth", "Token", "Trace"]
