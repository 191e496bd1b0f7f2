"""What a trace says: the tokens of one generation, the layers that each ran in, and what routers made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.runtime.bundle.manifest import LayerRouting, PathRouting
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.text.text import StreamDecoder, Text

Array = np.ndarray
# Of one routed layer, a number for every token; None where it is NaN or infinite, which JSON does not have.
Numbers = tuple[float | None, ...]
Routing = LayerRouting | PathRouting | None


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


class RowDepth(_Part):
    """How deep the tokens of a row went.

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
    def of(cls, decisions: Decisions, routing: Routing) -> RowDepth:
        """Summarise what was decided of a row's tokens, of which there is at least one."""
        layers, tokens = decisions.ran.shape
        taken = [len(path) for path in _paths(decisions, routing)] or decisions.ran.sum(axis=0)
        routed: tuple[RoutedLayer, ...] = ()
        if isinstance(routing, LayerRouting):
            told = zip(routing.layers, decisions.choices == 1, decisions.overflow, strict=True)
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
    """Tokens against layers.

    Attributes:
        speedup: the depth's name: "2", "keep", "full".
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
    def of(
        cls, decisions: Decisions, routing: Routing, tokens: Sequence[Token], *, strategy: str, speedup: str
    ) -> Trace:
        """Make a trace of what was decided of a row's tokens.

        Args:
            tokens: as many as the decisions are of, at least one.
        """
        layers = len(decisions.ran)
        if decisions.ran.shape[1] != len(tokens):
            raise ValueError(f"decisions: expected of {len(tokens)} tokens, found of {decisions.ran.shape[1]}")
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
        """How many tokens were given."""
        return sum(token.is_prompt for token in self.tokens)

    @property
    def layers_per_token(self) -> float:
        """The mean depth."""
        return sum(self.depth) / len(self.depth)


def _paths(decisions: Decisions, routing: Routing) -> tuple[tuple[int, ...], ...]:
    """Of every token, the layers that it took; none where tokens take no paths."""
    if not isinstance(routing, PathRouting):
        return ()
    layers = len(decisions.ran)
    return tuple(tuple(layer for layer in path if 0 <= layer < layers) for path in decisions.choices.T.tolist())


def _numbers(values: Array) -> tuple[Numbers, ...]:
    return tuple(tuple(value if math.isfinite(value) else None for value in row) for row in values.tolist())


__all__ = ["RoutedLayer", "RowDepth", "Token", "Trace"]
