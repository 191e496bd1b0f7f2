"""The order in which a looped model's tokens run its layers."""

from __future__ import annotations

from dataclasses import dataclass

from dynexport.runtime.bundle.contract import Loop
from dynexport.runtime.bundle.errors import DynexportError

# As for the layers of any model: a graph of more nodes than this makes is a mistake.
_MOST_RUNS = 4096


@dataclass(frozen=True)
class Order:
    """The runs of layers: those before the body, the body once per loop, those after it.

    Attributes:
        before: number of layers before the body.
        body: number of layers of the body.
        after: number of layers after the body.
        loops: most runs of the body.
    """

    before: int
    body: int
    after: int
    loops: int

    @classmethod
    def of(cls, contract: Loop, layers: int) -> Order:
        """Return the order of a contract for a model of ``layers`` layers. Raises DynexportError if it does not fit."""
        first, last = (0, layers - 1) if contract.body is None else contract.body
        if last >= layers:
            raise DynexportError(f"body: expected layers 0..{layers - 1}, found {last}")
        order = cls(first, last - first + 1, layers - 1 - last, contract.loops)
        if order.runs > _MOST_RUNS:
            raise DynexportError(
                f"loops: expected at most {_MOST_RUNS} runs of layers in all, found {order.loops} loops of {order.body}"
            )
        return order

    @property
    def runs(self) -> int:
        """The number of runs at full depth."""
        return self.before + self.loops * self.body + self.after

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of every run at full depth."""
        body = range(self.before, self.before + self.body)
        after = range(self.before + self.body, self.before + self.body + self.after)
        return (*range(self.before), *(layer for _ in range(self.loops) for layer in body), *after)

    def loop(self, number: int) -> range:
        """The runs of one loop, from 0."""
        start = self.before + number * self.body
        return range(start, start + self.body)

    def with_loops(self, loops: int) -> tuple[int, ...]:
        """The runs of a token that runs the first loops only."""
        skipped = {run for loop in range(loops, self.loops) for run in self.loop(loop)}
        return tuple(run for run in range(self.runs) if run not in skipped)


__all__ = ["Order"]
