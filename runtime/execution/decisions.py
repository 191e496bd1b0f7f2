"""The routers' decisions for tokens: the layers that each token ran in, the scores and the margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError, RouteError
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting

Array = np.ndarray
# The value in a path for a hop whose chosen layer had no room for the token.
TURNED_AWAY = -2
# The graph output of each kind of value.
_LAYER_OUTPUTS = {"choices": "routes", "scores": "route_scores", "margins": "route_margins"}
_PATH_OUTPUTS = {"choices": "paths", "scores": "path_scores", "margins": "path_margins"}


@dataclass(frozen=True)
class Decisions:
    """The decisions for one row's tokens.

    Attributes:
        ran: bool [layers, tokens], true where the token ran in the layer, or in any part of it that it could skip.
        choices: int64 [R, tokens]; R is 0 without routers. Routed layers: 1 for run, 0 for skip. Paths, one row per
            hop: the layer's number; the number of layers for an exit; -1 after the exit; ``TURNED_AWAY`` where the
            layer had no room.
        scores: float32 [R, tokens], the router's score of each choice.
        margins: float32 [R, tokens], the distance to the next best choice.
        overflow: int64 [R] or [1], number of tokens that found a cache or a layer full.
    """

    ran: Array
    choices: Array
    scores: Array
    margins: Array
    overflow: Array


class DecisionReader:
    """Reads and checks the decisions among a graph's outputs.

    Args:
        manifest: the bundle's manifest.

    Attributes:
        rows: R, the number of decisions per token.
        overflows: the number of overflow counters per row of the cache.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._routing, self._layers = manifest.routing, manifest.model.layers
        self._places = len(manifest.caches)
        self._covered: tuple[int, ...] = ()
        self._most = {cache.place: cache.most for cache in manifest.caches}
        if isinstance(self._routing, LayerRouting):
            self.rows = self.overflows = self._routing.decisions
            self._covered = self._routing.covered
            self._decision_of = np.repeat(np.arange(len(self._routing.layers)), self._routing.span)
            self._names: Mapping[str, str] = _LAYER_OUTPUTS
        elif isinstance(self._routing, PathRouting):
            self.rows, self.overflows, self._names = self._routing.hops, 1, _PATH_OUTPUTS
        else:
            self.rows, self.overflows, self._names = 0, 0, {}

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs in which a whole-step graph reports its decisions."""
        return [*self._names.values(), *(["overflow"] if isinstance(self._routing, LayerRouting) else [])]

    def check_forced(self, forced: Array) -> None:
        """Raise DynexportError for forced decisions, int64 [R, ..], that no router can make."""
        if isinstance(self._routing, PathRouting):
            most = self._layers if self._routing.exit else self._layers - 1
            wrong = np.argwhere((forced < -1) | (forced > most))
            if len(wrong):
                raise DynexportError(
                    f"forced path: hop {wrong[0][0]}: expected a layer 0..{self._layers - 1}"
                    f"{f', {self._layers} to leave' if self._routing.exit else ''} or -1, found "
                    f"{forced[tuple(wrong[0])]}"
                )
        elif forced.min(initial=0) < -1 or forced.max(initial=0) > 1:
            raise DynexportError(
                "forced: expected 1 to run, 0 to skip or -1 to leave it to the router, found "
                f"{forced[(forced < -1) | (forced > 1)][0]}"
            )

    def joined(self, parts: Sequence[Decisions]) -> Decisions:
        """Return the decisions of consecutive chunks of one row as one object."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Decisions(*self._no_tokens(), np.zeros(self.overflows, np.int64))
        return Decisions(
            np.concatenate([part.ran for part in parts], axis=1),
            np.concatenate([part.choices for part in parts], axis=1),
            np.concatenate([part.scores for part in parts], axis=1),
            np.concatenate([part.margins for part in parts], axis=1),
            np.sum([part.overflow for part in parts], axis=0),
        )

    def _no_tokens(self) -> tuple[Array, Array, Array, Array]:
        scores = np.zeros((self.rows, 0), np.float32)
        return np.zeros((self._layers, 0), bool), scores.astype(np.int64), scores, scores

    def layers_run(self, decisions: Decisions) -> Array:
        """Return how many layers each token ran, int64 [tokens]; a layer counts once per visit."""
        if isinstance(self._routing, PathRouting):
            found = (decisions.choices >= 0) & (decisions.choices < self._layers)
            return np.asarray(found.sum(axis=0))
        return np.asarray(decisions.ran.sum(axis=0))

    def read(
        self, results: Mapping[str, Array], counts: Array, positions: Array, active: Array, first_row: int
    ) -> tuple[Array, list[Decisions] | None]:
        """Read the decisions of a whole-step graph.

        Args:
            results: the graph's outputs.
            counts: int64 [B], number of tokens of each row.
            positions: int64 [B], position of each row's first token.
            active: bool [layers], true for layers that run.
            first_row: the number of the call's first row in the cache, for error messages.

        Returns:
            New entries of every cache, int64 [places, B]; and each row's decisions, or None without routers.

        Raises:
            DynexportError: for a score that is NaN, or an overflow where the contract calls it an error.
        """
        if self._routing is None:
            return active[:, None] * counts, None
        choices, scores, margins = (results[name] for name in self._names.values())
        choices = choices.astype(np.int64, copy=False)
        overflow = results.get("overflow")
        if overflow is None:
            overflow = np.zeros((self.overflows, len(counts)), np.int64)
        self._check_scores(scores, margins, counts, positions, first_row)
        self._check_overflow(overflow, first_row)
        rows = [
            self.of_row(choices[:, b, :n], scores[:, b, :n], margins[:, b, :n], overflow[:, b], active)
            for b, n in enumerate(counts)
        ]
        return self._entries(choices, counts, active), rows

    def of_row(self, choices: Array, scores: Array, margins: Array, overflow: Array, active: Array) -> Decisions:
        """Return the decisions for one row's tokens from its choices, int64 [R, tokens]."""
        if isinstance(self._routing, LayerRouting):
            ran = np.repeat(active[:, None], choices.shape[1], axis=1)
            if self._routing.skipped_kv != "computed":
                parts = (choices == 1).reshape(len(self._routing.layers), len(self._routing.parts), -1)
                ran[list(self._covered)] = parts.any(axis=1)[self._decision_of]
        else:
            ran = (choices[None] == np.arange(self._layers)[:, None, None]).any(axis=1)
        return Decisions(ran, choices, scores, margins, overflow)

    def unrouted(self, active: Array, tokens: int) -> Decisions:
        """Return decisions without routers: all tokens of a row run in the active layers, bool [layers]."""
        scores = np.zeros((0, tokens), np.float32)
        ran = np.repeat(active[:, None], tokens, axis=1)
        return Decisions(ran, scores.astype(np.int64), scores, scores, np.zeros(0, np.int64))

    def first(self, decisions: Decisions | None, tokens: int, active: Array) -> tuple[Array, Decisions] | None:
        """Return the entries, int64 [places], and the decisions of the first tokens of a row's run.

        Args:
            decisions: of all its tokens; None without routers.
            tokens: number of the first tokens.
            active: bool [layers], true for layers that run.

        Returns:
            None if their entries do not come first in every cache, or their overflow is not known.
        """
        if decisions is None:
            return active * np.int64(tokens), self.unrouted(active, tokens)
        mixed = isinstance(self._routing, PathRouting) and self._routing.places == "layers"
        if mixed or decisions.overflow.any():
            return None
        choices, scores, margins = (
            each[:, :tokens] for each in (decisions.choices, decisions.scores, decisions.margins)
        )
        kept = self.of_row(choices, scores, margins, decisions.overflow, active)
        return self._entries(kept.choices[:, None], np.array([tokens]), active)[:, 0], kept

    def _entries(self, choices: Array, counts: Array, active: Array) -> Array:
        if isinstance(self._routing, LayerRouting):
            entries: Array = active[:, None] * counts
            if self._routing.skipped_kv == "none":
                of_attention = choices[:: len(self._routing.parts)]
                entries[list(self._covered)] = of_attention.sum(axis=2)[self._decision_of]
            return entries
        assert isinstance(self._routing, PathRouting)
        if self._routing.places == "hops":
            return np.asarray(((choices >= 0) & (choices < self._layers)).sum(axis=2))
        return np.stack([(choices == layer).sum(axis=(0, 2)) for layer in range(self._layers)])

    def _check_scores(self, scores: Array, margins: Array, counts: Array, positions: Array, first_row: int) -> None:
        paths = isinstance(self._routing, PathRouting)
        if np.isfinite(scores).all() and not np.isnan(margins).any():
            return
        bad = (~np.isfinite(scores) if paths else np.isnan(scores)) | np.isnan(margins)
        broken = np.argwhere(bad & (np.arange(scores.shape[2]) < counts[:, None]))
        if not len(broken):
            return
        place, row, token = broken[0]
        if paths:
            raise nan_in_hop(int(place), first_row + int(row), int(positions[row] + token))
        assert isinstance(self._routing, LayerRouting)
        layer = self._routing.layer_of(int(place))
        raise DynexportError(
            f"layer {layer}: row {first_row + row}, token {token}: expected a router score, "
            "found NaN; the hidden states before it overflow, look for the layer with: dynexport verify"
        )

    def _check_overflow(self, overflow: Array, first_row: int) -> None:
        if isinstance(self._routing, LayerRouting) and self._routing.overflow == "error" and overflow.any():
            place, row = np.argwhere(overflow)[0]
            layer = self._routing.layer_of(int(place))
            raise RouteError(
                f"layer {layer}: row {first_row + row}: all {self._most[layer]} entries of its cache are used, and "
                "the contract's cache.overflow is error; convert with a larger cache.capacity, or with residual"
            )


def nan_in_hop(hop: int, row: int, position: int) -> DynexportError:
    """Return the error for a router score of a hop that is NaN or infinite."""
    return DynexportError(
        f"hop {hop}: row {row}, position {position}: expected router scores, found NaN or infinity; the hidden states "
        "before it overflow"
    )


__all__ = ["TURNED_AWAY", "DecisionReader", "Decisions", "nan_in_hop"]
