"""Speed of decoding with drafts, compared with decoding without them, pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle.checks import checked_count, checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import Tokens
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.request import Piece
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.generation.speculation import Speculation
from dynexport.runtime.measure.other_work import OtherWork

LOOKUP, LOOKUP_WITH_NGRAMS = "prompt lookup", "prompt lookup and n-grams"
# Below this the drafts cost more than a measurement's noise.
LEAST_GAIN = 0.97


class Speculated(BaseModel):
    """Decoding with drafts beside decoding without, over the same prompts.

    Attributes:
        drafter: "prompt lookup", "prompt lookup and n-grams" where the bundle has a table, or the name of a depth.
        most: most drafts of a row in a step.
        gain: time without drafts / time with them, of all tokens after the first: median over repetitions.
        gain_quartiles: its quartiles.
        plain_milliseconds: median time of a token of a row without drafts.
        milliseconds: the same with drafts.
        accepted: number of tokens that were drafted.
        rejected: number of steps that ended with a rejected draft.
        acceptance: share of the drafts that were compared with the full model's choice which agreed; None without any.
        tokens_per_step: tokens of a row in a step.
        ideal_gain: steps without drafts / with them: the gain if drafts cost nothing and every step took as long.
        efficiency: gain / ideal_gain.
        texts: number of texts.
        same_texts: number of them with the same tokens both ways.
        others_share: share of the machine that other processes took; None where the system does not tell.
    """

    drafter: str
    most: int
    gain: float
    gain_quartiles: tuple[float, float]
    plain_milliseconds: float
    milliseconds: float
    accepted: int
    rejected: int
    acceptance: float | None
    tokens_per_step: float
    ideal_gain: float
    efficiency: float
    texts: int
    same_texts: int
    others_share: float | None


@dataclass(frozen=True)
class DraftedWork:
    """What is decoded with and without drafts.

    Attributes:
        groups: prompts, token ids; those of a group run together.
        new_tokens: most new tokens of a prompt.
        depth: the depth that decodes.
        repeats: number of repetitions; each runs every group both ways, in turn.
        sampling: how tokens are chosen.
        chat: as for ``Options``.

    Raises:
        DynexportError: for a number below 1, or fewer than 2 new tokens, of which none would be timed.
    """

    groups: Sequence[Sequence[Tokens]]
    new_tokens: int
    depth: Depth
    repeats: int = 5
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    chat: bool = False

    def __post_init__(self) -> None:
        checked_count("new_tokens", self.new_tokens, 2)
        checked_count("repeats", self.repeats)


@dataclass(frozen=True)
class _Answered:
    """The answers to a group of prompts: pieces per row without each row's first, and the time of these."""

    seconds: float
    rows: list[list[Piece]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def ids(self) -> list[list[int]]:
        return [[piece.token for piece in row] for row in self.rows]

    @property
    def steps_of_rows(self) -> list[int]:
        """The number of steps of each row: one ends at a token that no draft foresaw, or at the end."""
        return [
            sum(piece.draft != piece.token for piece in row) + bool(row and row[-1].draft == row[-1].token)
            for row in self.rows
        ]


_Pair: TypeAlias = tuple[_Answered, _Answered]  # without drafts, and with them


def measure_drafts(
    model: Model,
    work: DraftedWork,
    speculations: Sequence[Speculation],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Speculated]:
    """Time decoding with each way of drafting beside decoding without drafts.

    Args:
        model: the model, which runs every way once before it is timed.
        work: the prompts, and how they are answered.
        speculations: the ways of drafting.
        progress: called after every repetition with the number of repetitions done and the total.

    Returns:
        One result for each way, in this order.

    Raises:
        DynexportError: as for ``Model.generate``, and for prompts whose answers all end with their first token.
    """
    checked_kind("work", work, DraftedWork, "a DraftedWork")
    for way in (None, *speculations):
        _answered(model, work, work.groups[0], way)
    # The two sides of a pair run one after the other, so that neither has the machine in another state.
    pairs: list[list[list[_Pair]]] = [[] for _ in speculations]  # [way][repetition][group]
    other = OtherWork()
    for repeat in range(work.repeats):
        for way, runs in zip(speculations, pairs, strict=True):
            sides = [None, way][:: -1 if repeat % 2 else 1]
            answers = [{side: _answered(model, work, group, side) for side in sides} for group in work.groups]
            runs.append([(each[None], each[way]) for each in answers])
        progress(repeat + 1, work.repeats)
    share = other.share()
    if not any(plain.tokens for runs in pairs for run in runs for plain, _ in run):
        raise DynexportError("prompts: expected some with answers of at least 2 tokens, found none")
    lookup = LOOKUP if model.bundle.manifest.ngrams is None else LOOKUP_WITH_NGRAMS
    return [
        _result(lookup if how.depth is None else how.depth.name, how.most, runs, share)
        for how, runs in zip(speculations, pairs, strict=True)
    ]


def _answered(model: Model, work: DraftedWork, prompts: Sequence[Tokens], speculation: Speculation | None) -> _Answered:
    rows: list[list[Piece]] = [[] for _ in prompts]
    stream = model.stream(
        list(prompts),
        max_new_tokens=work.new_tokens,
        sampling=work.sampling,
        depth=work.depth,
        speculation=speculation,
        chat=work.chat,
    )
    for _ in prompts:
        next(stream)
    start = time.perf_counter()
    for piece in stream:
        rows[piece.row].append(piece)
    return _Answered(time.perf_counter() - start, rows)


def _result(drafter: str, most: int, runs: list[list[_Pair]], others: float | None) -> Speculated:
    plain, drafted = ([[pair[side] for pair in run] for run in runs] for side in range(2))
    gains = [_seconds(one) / _seconds(other) for one, other in zip(plain, drafted, strict=True)]
    gain, quartiles = statistics.median(gains), np.quantile(gains, (0.25, 0.75)).tolist()
    answers, pairs = [answer for run in drafted for answer in run], [pair for run in runs for pair in run]
    pieces = [piece for answer in answers for row in answer.rows for piece in row if piece.draft is not None]
    accepted = sum(piece.draft == piece.token for piece in pieces)
    same = [a == b for one, other in pairs for a, b in zip(one.ids, other.ids, strict=True)]
    ideal = sum(max(one.steps_of_rows) for one, _ in pairs) / max(1, sum(max(a.steps_of_rows) for a in answers))
    return Speculated(
        drafter=drafter,
        most=most,
        gain=gain,
        gain_quartiles=(quartiles[0], quartiles[1]),
        plain_milliseconds=statistics.median(map(_milliseconds, plain)),
        milliseconds=statistics.median(map(_milliseconds, drafted)),
        accepted=accepted,
        rejected=len(pieces) - accepted,
        acceptance=accepted / len(pieces) if pieces else None,
        tokens_per_step=sum(a.tokens for a in answers) / max(1, sum(sum(a.steps_of_rows) for a in answers)),
        ideal_gain=ideal,
        efficiency=gain / ideal if ideal else 0.0,
        texts=len(same),
        same_texts=sum(same),
        others_share=others,
    )


def _seconds(answers: Sequence[_Answered]) -> float:
    return sum(answer.seconds for answer in answers)


def _milliseconds(answers: Sequence[_Answered]) -> float:
    """Return the time of a token of a row; the rows of a group run at the same time."""
    return 1e3 * _seconds(answers) / max(1, sum(max(map(len, answer.rows)) for answer in answers))


__all__ = ["LEAST_GAIN", "LOOKUP", "LOOKUP_WITH_NGRAMS", "DraftedWork", "Speculated", "measure_drafts"]
