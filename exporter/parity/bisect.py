"""Which layer is the first whose output departs from the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from dynexport.exporter.parity.cases import replay
from dynexport.exporter.parity.metrics import FloatArray, relative_error
from dynexport.exporter.parity.probe import EMBEDDING, ProbeDecoder
from dynexport.exporter.reference import Case, Oracle

Place: TypeAlias = int | Literal["embedding", "head"]
"""A layer, or what stands before the first, or after the last: final norm and head."""


def errors_by_layer(decoder: ProbeDecoder, oracle: Oracle, cases: Sequence[Case]) -> dict[str, float]:
    """How far hidden states are from the reference's, after the embedding and after every layer.

    Args:
        decoder: nothing has run on it.
        cases: run as one batch, as the check ran them that failed; routed layers as the reference routes them.

    Returns:
        The largest relative error of a token's hidden state, by "embedding" and the layers' numbers, in order.
    """
    told = [answer.routes.decisions for answer in oracle.answers(cases) if answer.routes is not None]
    replay(decoder, cases, chunk=max(len(case.tokens) for case in cases), forced=told or None)
    expected = oracle.hidden_states(cases)
    return {
        name: max(
            relative_error(expected[row][place], _row(decoder.calls, name, row, case)) for row, case in enumerate(cases)
        )
        for place, name in enumerate(decoder.calls[0])
    }


def first_departure(errors: Mapping[str, float], limit: float) -> Place:
    """Where the first error is beyond the limit; "head" when none is, for the logits are wrong all the same."""
    for name, error in errors.items():
        if not error <= limit:
            return "embedding" if name == EMBEDDING else int(name)
    return "head"


def _row(calls: Sequence[Mapping[str, FloatArray]], name: str, row: int, case: Case) -> FloatArray:
    """One row's hidden states over all calls, without the padding of its prompt: float32 [length, hidden]."""
    first, *later = (call[name][row] for call in calls)
    return np.concatenate([first[: case.prompted[0][1]], *later])
