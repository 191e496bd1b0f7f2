"""What became of each token: which layers it ran in, and what the routers of routed layers made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dynexport.runtime.contract import Mod, Radial
from dynexport.runtime.errors import DynexportError

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


__all__ = ["TURNED_AWAY", "RowLog", "StepRoutes"]
