"""A run mode of a benchmark: what it runs, its timings, and the figures that follow from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.measure.bandwidth import ReadBandwidth, fits
from dynexport.runtime.measure.other_work import share_of
from dynexport.runtime.measure.results import Result
from dynexport.runtime.measure.timed_run import Sizes, Timed

# A measurement is steady where the quartiles of its ratios differ by at most this share of the median.
_STEADY = 0.1


@dataclass
class Mode:
    """A run mode and its timings.

    Attributes:
        name: the result's name.
        run: runs the mode once.
        prescribed: whether every prescribed decision has to be carried out.
        timed: its timings, one per repetition.
        bandwidths: bytes per second at the size of a step, one per repetition; empty on a GPU.
    """

    name: str
    run: Callable[[], Timed]
    prescribed: bool = False
    timed: list[Timed] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Run the mode once and keep its timing. Raises DynexportError where a prescribed decision was dropped."""
        timed = self.run()
        if self.prescribed and timed.turned_away:
            raise DynexportError(
                f"{self.name}: expected room for every token that is sent to a layer, found {timed.turned_away} turned "
                "away because a cache or capacity was full; lower --prompt-tokens and --new-tokens, or name a bundle "
                "of the same model without routers with --baseline"
            )
        self.timed.append(timed)

    def measure_bandwidth(self, memory: ReadBandwidth) -> None:
        """Measure the bandwidth at the size of the last run's step."""
        self.bandwidths.append(memory.measure(round(self.step_bytes)))

    @property
    def decode(self) -> list[float]:
        """Return the seconds of one decode step, per repetition."""
        return [timed.decode_seconds for timed in self.timed]

    @property
    def prefill(self) -> list[float]:
        """Return the seconds of the prefill, per repetition that had one."""
        return [timed.prefill_seconds for timed in self.timed if timed.prefill_seconds is not None]

    @property
    def step_bytes(self) -> float:
        """Return the bytes that a step of the last run had to read."""
        return self.timed[-1].bytes / len(self.timed[-1].step_seconds)


def result_of(mode: Mode, full: Mode, sizes: Sizes, cache: int | None) -> Result:
    """Return the figures of a mode, against full depth.

    Args:
        mode: a mode that was measured.
        full: the mode of full depth, measured in the same repetitions.
        sizes: the sizes of the runs.
        cache: bytes of the last-level cache, if known.
    """
    seconds, last, prefills = statistics.median(mode.decode), mode.timed[-1], mode.prefill or full.prefill
    decode, prefill = _ratios(full.decode, mode.decode), _ratios(full.prefill, prefills)
    steps = [step for timed in mode.timed for step in timed.step_seconds]
    measured, ideal = statistics.median(decode), full.timed[-1].bytes / last.bytes
    bandwidth = statistics.median(mode.bandwidths) if mode.bandwidths else None
    return Result(
        name=mode.name,
        layers=last.layers,
        prefill_tokens_per_second=sizes.rows * sizes.prompt_tokens / statistics.median(prefills),
        prefill_milliseconds=1e3 * statistics.median(prefills),
        prefill_least_milliseconds=1e3 * min(prefills),
        prefill_quartiles_milliseconds=quartiles([1e3 * each for each in prefills]),
        prefill_speedup=statistics.median(prefill),
        prefill_speedup_quartiles=quartiles(prefill),
        prefill_ideal_speedup=full.timed[-1].flops / last.flops,
        decode_milliseconds=1e3 * seconds,
        decode_least_milliseconds=1e3 * min(steps),
        decode_quartiles_milliseconds=quartiles([1e3 * each for each in steps]),
        tokens_per_second=sizes.rows / seconds,
        speedup=measured,
        speedup_quartiles=quartiles(decode),
        steady=mode is full or (is_steady(decode) and is_steady(prefill)),
        ideal_speedup=ideal,
        efficiency=measured / ideal,
        bytes_per_step=mode.step_bytes,
        gigabytes_per_second=mode.step_bytes / seconds / 1e9,
        bandwidth_gigabytes_per_second=None if bandwidth is None else bandwidth / 1e9,
        ideal_milliseconds=None if bandwidth is None else 1e3 * mode.step_bytes / bandwidth,
        fits_cache=fits(mode.step_bytes, cache),
        others_share=others_share(mode.timed),
        turned_away=last.turned_away,
    )


def others_share(timed: Iterable[Timed]) -> float | None:
    """Return the share of the machine that other processes took during runs; None where the system does not tell."""
    available, taken = 0.0, 0.0
    for each in timed:
        if each.others_seconds is None:
            return None
        available, taken = available + each.processor_seconds, taken + each.others_seconds
    return share_of(taken, available)


def _ratios(full: Sequence[float], part: Sequence[float]) -> list[float]:
    """Return full depth's time / this time, per repetition."""
    return [whole / own for whole, own in zip(full, part, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile, linearly interpolated."""
    lower, upper = np.quantile(values, (0.25, 0.75))
    return float(lower), float(upper)


def is_steady(ratios: Sequence[float]) -> bool:
    """Return whether there are three or more ratios and their quartiles differ by at most a tenth of the median."""
    lower, upper = quartiles(ratios)
    return len(ratios) >= 3 and upper - lower <= _STEADY * statistics.median(ratios)


__all__ = ["Mode", "is_steady", "others_share", "quartiles", "result_of"]
