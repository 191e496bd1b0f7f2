"""Options and results of a calibration of router thresholds (docs/calibration.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of a calibration.

    Attributes:
        target_rate: share of the tokens that run in a routed layer, in (0, 1]; None takes the contract's capacity.
        window: tokens per window; the text is split into windows, each a sequence of its own.
        max_tokens: the largest number of the text's tokens to use.
        batch: windows per batch; the bundle's limit may lower it. It does not change the result.
        threads: intra-op threads of ONNX Runtime; None for one per physical core.
        progress: called with the number of finished windows and the total over all passes.
    """

    target_rate: float | None = None
    window: int = 256
    max_tokens: int = 4096
    batch: int = 8
    threads: int | None = None
    progress: Callable[[int, int], None] | None = None


class Rule(BaseModel):
    """A threshold and its effect on a text.

    Attributes:
        threshold: the threshold of the router's probability.
        rate: share of the tokens that run.
        flips: share of the tokens for which top-k over the window decides differently.
    """

    threshold: float
    rate: float
    flips: float


class LayerCalibration(BaseModel):
    """The calibration of one routed layer.

    Attributes:
        layer: the layer's number.
        now: the bundle's threshold, measured with the bundle's thresholds in all layers.
        calibrated: the new threshold, measured with the new thresholds in the layers before it.
    """

    layer: int
    now: Rule
    calibrated: Rule


class Calibration(BaseModel):
    """The thresholds that meet a target rate on a text.

    Attributes:
        target_rate: the wanted share of tokens that run.
        tokens: number of tokens of the text that were used.
        window: tokens per window.
        k: tokens that top-k chooses from each window.
        layers: one result per routed layer, ascending.
    """

    target_rate: float
    tokens: int
    window: int
    k: int
    layers: list[LayerCalibration]

    @property
    def thresholds(self) -> dict[str, float]:
        """The contract's field ``thresholds`` for JSON: layer -> threshold."""
        return {str(layer.layer): layer.calibrated.threshold for layer in self.layers}


__all__ = ["Calibration", "CalibrationOptions", "LayerCalibration", "Rule"]
