"""A matrix as blocks of small integers, the form in which quantised files hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Form:
    """The form that all matrices of one stored type have.

    Attributes:
        kind: the name of the stored type, such as Q4_K.
        bits: the bits that each integer needs.
        zero: the integer that stands for 0 where there is no minimum.
        size: the number of values in a block.
        minima: whether blocks have a minimum.
    """

    kind: str
    bits: int
    zero: int
    size: int
    minima: bool = False


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix [N, K]: weight[n, b * size + i] = scale[n, b] * (q[n, b, i] - zero) + minimum[n, b], in float32.

    Attributes:
        kind: the name of the stored type, such as Q4_K.
        bits: the bits that each integer needs.
        zero: the integer that stands for 0 where there is no minimum.
        q: uint8 [N, K / size, size].
        scale: float32 [N, K / size].
        minimum: float32 [N, K / size]; None where no block has one.
    """

    kind: str
    bits: int
    zero: int
    q: Array
    scale: Array
    minimum: Array | None = None

    @property
    def size(self) -> int:
        """The number of values in a block."""
        return int(self.q.shape[2])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [N, K] of the matrix."""
        return len(self.q), self.q.shape[1] * self.size

    def values(self) -> Array:
        """Return the matrix, float32 [N, K]."""
        integers = self.q.astype(np.float32) - np.float32(self.zero)
        values: Array = self.scale[..., None] * integers
        if self.minimum is not None:
            values += self.minimum[..., None]
        return values.reshape(self.shape)

    def move_rows(self, move: Callable[[Array], Array]) -> Blocks:
        """Return the blocks of the matrix after ``move``, which selects or orders rows of an array [N, ..]."""
        minimum = None if self.minimum is None else move(self.minimum)
        return Blocks(self.kind, self.bits, self.zero, move(self.q), move(self.scale), minimum)


def stack(parts: Sequence[Blocks]) -> list[Blocks]:
    """Return matrices with equal numbers of columns as one over the other, neighbours of one type joined into one."""
    stacked: list[Blocks] = []
    for part in parts:
        if stacked and stacked[-1].kind == part.kind:
            above = stacked.pop()
            minimum = None
            if above.minimum is not None and part.minimum is not None:
                minimum = np.concatenate([above.minimum, part.minimum])
            q, scale = np.concatenate([above.q, part.q]), np.concatenate([above.scale, part.scale])
            part = Blocks(part.kind, part.bits, part.zero, q, scale, minimum)
        stacked.append(part)
    return stacked
