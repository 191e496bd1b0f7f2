"""Arrange the rows of a cache: which answer moves where, so that rows that share a call are adjacent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.serving.work import Answer


def arrange(cache: KvCache, groups: Sequence[Sequence[Answer]]) -> None:
    """Move the answers of each group to adjacent rows, the first group from row 0; answers stay where they can.

    Does nothing if a move is needed and no row of the cache is free: rows that are not adjacent only cost time.

    Args:
        cache: the cache.
        groups: all answers that hold rows, by group.
    """
    moves = list(_moves(groups))
    if not moves or not cache.free:
        return
    at = {answer.row: answer for group in groups for answer in group}
    for answer, target in moves:
        if (other := at.get(target)) is not None:
            _move(cache, at, other, cache.free[-1])
        _move(cache, at, answer, target)


def _moves(groups: Sequence[Sequence[Answer]]) -> Iterator[tuple[Answer, int]]:
    first = 0
    for group in groups:
        own = range(first, first + len(group))
        first += len(group)
        taken = {answer.row for answer in group}
        empty = (row for row in own if row not in taken)
        for answer in group:
            if answer.row not in own:
                yield answer, next(empty)


def _move(cache: KvCache, at: dict[int, Answer], answer: Answer, target: int) -> None:
    cache.move(answer.row, target)
    del at[answer.row]
    answer.row = target
    at[target] = answer


__all__ = ["arrange"]
