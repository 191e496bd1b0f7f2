"""What became of each token: which layers it ran in, and what the routers of routed layers made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from dynexport.runtime.bundle.contract import Mod, Radial
from dynexport.runtime.bundle.errors import DynexportError

Array = np.ndarray
# In a path, of a step in which the chosen layer had no room for the token.
TURNED_AWAY = -2


def check_forced_paths(contract: Radial, layers: int, forced: Array) -> None:
    """Raise DynexportError for a forced path, int64 [max_steps, ..], with what is no choice."""
    wrong = np.argwhere((forced < -1) | (forced >= contract.choices(layers)))
    if len(wrong):
        raise DynexportError(
            f"forced path: step {wrong[0][0]}: expected a layer 0..{layers - 1}"
            f"{f', {layers} to leave' if contract.exit else ''} or -1, found {forced[tuple(wrong[0])]}"
        )


@dataclass(frozen=True)
class StepRoutes:
    """A step's decisions in the R routed layers.

    Attributes:
        chosen: bool [R, B, S], tokens that ran.
        scores: float32 [R, B, S].
        margins: float32 [R, B, S], to the other decision.
        overflow: int64 [R, B], tokens that found the layer's cache full.
    """

    chosen: Array
    scores: Array
    margins: Array
    overflow: Array

    OUTPUTS: ClassVar = frozenset({"routes", "route_scores", "route_margins", "overflow"})

    @classmethod
    def of(cls, results: dict[str, Array]) -> StepRoutes:
        """Of a graph's outputs."""
        return cls(results["routes"], results["route_scores"], results["route_margins"], results["overflow"])

    def check(self, contract: Mod, slots: int, token_counts: Array) -> None:
        """Refuse what is no route.

        Args:
            slots: entries of a routed layer's cache.
            token_counts: int64 [B], real tokens.

        Raises:
            DynexportError: for a score that is NaN, or an overflow where the contract calls it an error.
        """
        if np.isnan(self.scores).any() or np.isnan(self.margins).any():
            real = np.arange(self.scores.shape[2]) < token_counts[:, None]
            broken = np.argwhere((np.isnan(self.scores) | np.isnan(self.margins)) & real)
            if len(broken):
                place, row, token = broken[0]
                raise DynexportError(
                    f"layer {contract.routed_layers[place]}: row {row}, token {token}: expected a router score, found "
                    "NaN; the hidden states before it overflow, look for the layer with: dynexport verify"
                )
        if contract.cache.overflow == "error" and self.overflow.any():
            place, row = np.argwhere(self.overflow)[0]
            raise DynexportError(
                f"layer {contract.routed_layers[place]}: row {row}: all {slots} entries of its cache are used, and the "
                "contract's cache.overflow is error; convert with a larger cache.capacity, or with residual"
            )


@dataclass(frozen=True)
class StepPaths:
    """The paths of a step's tokens, as a graph of all steps tells them.

    Attributes:
        paths: int64 [max_steps, B, S], as in ``RowLog``.
        scores, margins: float32 [max_steps, B, S], of the choice in every step.
    """

    OUTPUTS: ClassVar = frozenset({"paths", "path_scores", "path_margins"})

    paths: Array
    scores: Array
    margins: Array

    @classmethod
    def of(cls, results: dict[str, Array]) -> StepPaths:
        """Of a graph's outputs; ``OUTPUTS`` are their names."""
        return cls(results["paths"], results["path_scores"], results["path_margins"])

    def check(self, token_counts: Array, positions: Array) -> None:
        """Raise DynexportError for a score that is NaN or infinite.

        Args:
            token_counts: int64 [B], real tokens.
            positions: int64 [B], of every row's first token.
        """
        real = np.arange(self.paths.shape[2]) < token_counts[:, None]
        broken = np.argwhere((~np.isfinite(self.scores) | np.isnan(self.margins)) & real)
        if len(broken):
            step, row, token = broken[0]
            raise DynexportError(
                f"step {step}: row {row}, position {positions[row] + token}: expected router scores, found NaN or "
                "infinity; the hidden states before it overflow"
            )

    def entries(self, contract: Radial, layers: int) -> Array:
        """int64 [places, B], how many every cache has got: of steps or layers, as the contract says."""
        if contract.cache_policy == "step":
            return np.asarray(((self.paths >= 0) & (self.paths < layers)).sum(axis=2))
        return np.stack([(self.paths == layer).sum(axis=(0, 2)) for layer in range(layers)])

    def record(self, logs: list[RowLog], token_counts: Array, layers: int) -> None:
        """Add the real tokens to their rows' logs."""
        for row, (log, count) in enumerate(zip(logs, token_counts, strict=True)):
            path = self.paths[:, row, :count]
            log.ran.append(np.stack([(path == layer).any(axis=0) for layer in range(layers)]))
            log.scores.append(self.scores[:, row, :count])
            log.margins.append(self.margins[:, row, :count])
            log.paths.append(path)


@dataclass
class RowLog:
    """All tokens of one row, as they came.

    Attributes:
        ran: bool [layers, tokens], one array a step.
        scores, margins: float32 [R, tokens], one array a step; none where no layer is routed. Where tokens choose their
            paths, of the choice in every of R steps.
        paths: int64 [R, tokens], where tokens choose them: the layer of every step, the number of layers for leaving,
            -1 after that; ``TURNED_AWAY`` where a token did not run, as the layer was full.
    """

    ran: list[Array] = field(default_factory=list)
    scores: list[Array] = field(default_factory=list)
    margins: list[Array] = field(default_factory=list)
    paths: list[Array] = field(default_factory=list)

    def keep(self, steps: int) -> None:
        """Forget all but the tokens of the first ``steps`` steps."""
        for part in (self.ran, self.scores, self.margins, self.paths):
            del part[steps:]

    def clear(self) -> None:
        """Forget every token."""
        self.keep(0)


__all__ = ["TURNED_AWAY", "RowLog", "StepPaths", "StepRoutes", "check_forced_paths"]
