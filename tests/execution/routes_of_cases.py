"""What an independent implementation answers to the prompts of looped cases, and how many layers each token ran in."""

from __future__ import annotations

import json
from dataclasses import dataclass

from bundles import CONFORMANCE
from forms import SERVED

LOOPED = ("loop-exit", "huginn-exit")


@dataclass(frozen=True)
class Answered:
    """One prompt of a case.

    Attributes:
        prompt: its ids.
        greedy: the ids that follow.
        layers: the number of layers that the token before each of them ran in.
    """

    prompt: list[int]
    greedy: list[int]
    layers: list[int]


def runs_of(form: str) -> list[Answered]:
    """Return the answers to the prompts of a form's case, whose margins are all beyond rounding."""
    found = json.loads((CONFORMANCE / SERVED[form][0] / "expected.json").read_text())["runs"]
    assert all(min(*run["logit_margins"], run["smallest_route_margin"]) > 1e-3 for run in found)
    return [
        Answered(run["prompt"], run["greedy"], [sum(route) for route in run["routes"]][len(run["prompt"]) - 1 :])
        for run in found
    ]


__all__ = ["LOOPED", "Answered", "runs_of"]
