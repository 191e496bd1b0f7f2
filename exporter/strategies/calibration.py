"""What calibration finds of a bundle whose routers have thresholds (docs/calibration.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class CalibrationOptions:
    """How a text is run.

    Attributes:
        target_rate: share of the tokens that shall run, in (0, 1]; None takes the contract's capacity.
        window: tokens of the pieces that the text is cut into; each is a sequence of its own.
        max_tokens: use at most so many tokens of the text.
        batch: windows that run together, at most as many as the bundle takes; it does not change the result.
        threads: intra-op threads of ONNX Runtime; None for one per physical core.
        progress: called with windows done and in all, every pass counted.
    """

    target_rate: float | None = None
    window: int = 256
    max_tokens: int = 4096
    batch: int = 8
    threads: int | None = None
    progress: Callable[[int, int], None] | None = None


class Rule(BaseModel):
    """What a threshold does to a text.

    Attributes:
        rate: share of the tokens that run.
        flips: share of the tokens on which top-k, within each window, decides otherwise.
    """

    threshold: float
    rate: float
    flips: float


class LayerCalibration(BaseModel):
    """One routed layer: its rule as it is, when all layers have theirs; and calibrated, when all have that."""

    layer: int
    now: Rule
    calibrated: Rule


class Calibration(BaseModel):
    """Thresholds that meet ``target_rate`` on ``tokens`` tokens, in windows of ``window``; top-k takes k of each."""

    target_rate: float
    tokens: int
    window: int
    k: int
    layers: list[LayerCalibration]

    @property
    def thresholds(self) -> dict[str, float]:
        """As the contract's ``thresholds`` stand in JSON: layer -> threshold."""
        return {str(layer.layer): layer.calibrated.threshold for layer in self.layers}


__all__ = ["Calibration", "CalibrationOptions", "LayerCalibration", "Rule"]
