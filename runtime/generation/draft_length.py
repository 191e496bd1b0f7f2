"""Choose how many tokens to draft, from the acceptance of earlier drafts and the times of calls."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Weight of the latest time, and of the latest draft, in the averages.
LATEST, _LATEST_DRAFT = 0.2, 0.3
# Time of a further token of a call, as a share of a plain step's, before it is known.
_FIRST_GUESS = 0.1
# Acceptance before it is known, of drafts that cost nothing and of those of a depth, which would else never be tried.
HOPED_OF_LOOKUP, HOPED_OF_DEPTH = 0.5, 0.8
# The share by which it returns there in a step without drafts: drafts that did not pay are tried again after some
# hundred tokens. It is halved whenever that was in vain, down to an eighth.
_RETURN, _LEAST_RETURN = 0.005, 0.005 / 8


class CallTimes:
    """Average times of calls by their number of tokens, padding included."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """Add the time of a call. A time that is far from the average counts as twice or half of it."""
        known = self._seconds.get(tokens)
        if known is None:
            self._seconds[tokens] = seconds
        else:
            self._seconds[tokens] += LATEST * (min(max(seconds, known / 2), known * 2) - known)

    def of(self, tokens: int) -> float:
        """Return the time of a call in seconds: known, between known ones, or a hopeful guess; 0 if none is known."""
        if not self._seconds:
            return 0.0
        sizes = sorted(self._seconds)
        place = bisect_left(sizes, tokens)
        if place == len(sizes):
            least, last = sizes[0], sizes[-1]
            return self._seconds[last] + (tokens - last) * _FIRST_GUESS * self._seconds[least] / least
        if sizes[place] == tokens or not place:
            return self._seconds[sizes[place]]
        before, after = sizes[place - 1], sizes[place]
        share = (tokens - before) / (after - before)
        return self._seconds[before] + share * (self._seconds[after] - self._seconds[before])


class Acceptance:
    """The probability that a row's next draft is accepted if all before it were.

    Attributes:
        rate: the estimate.
        drafted: number of drafts that were verified.
        accepted: number of drafts that were accepted.

    Args:
        hoped: the estimate before any draft.
    """

    def __init__(self, hoped: float = HOPED_OF_LOOKUP) -> None:
        self._hoped, self._return = hoped, _RETURN
        self.rate, self.drafted, self.accepted = hoped, 0, 0

    def of_next_row(self) -> Acceptance:
        """Return the acceptance of another row, whose drafts are expected to be accepted as these are."""
        following = Acceptance(self._hoped)
        following.rate, following._return = self.rate, self._return
        return following

    def add(self, drafted: int, accepted: int, *, foreseen: bool = False) -> None:
        """Add the result of a step: the first ``accepted`` of ``drafted`` drafts were accepted.

        Drafts that a table foresaw are counted, and say nothing of the others.
        """
        self.drafted += drafted
        self.accepted += accepted
        if foreseen:
            drafted = accepted = 0
        if not drafted:
            self.rate += self._return * (self._hoped - self.rate)
        elif not accepted:
            self._return = max(self._return / 2, _LEAST_RETURN)
        elif accepted == drafted:
            self._return = _RETURN
        for tried in range(min(drafted, accepted + 1)):
            self.rate += _LATEST_DRAFT * ((tried < accepted) - self.rate)


class Trust:
    """How often a table's tokens came true, beside how often it expected that.

    Args:
        forgotten: the share of it that is forgotten at a token.
        before: how many expected tokens the ratio that was known before counts for.
    """

    def __init__(self, forgotten: float, before: float) -> None:
        self._kept, self._before = 1 - forgotten, before
        self._expected = self._came = 0.0

    def add(self, expected: float, came: bool) -> None:
        """Add a token that the table expected with this probability."""
        self._expected = self._kept * self._expected + expected
        self._came = self._kept * self._came + came

    def ratio(self, known: float = 1.0) -> float:
        """Return the ratio of tokens that came true to those expected; ``known`` before any was seen."""
        return (self._came + self._before * known) / (self._expected + self._before)


def best_count(
    chances: Sequence[Sequence[float]], calls: CallTimes, draft_share: float, least_gain: float = 1.0
) -> int:
    """Return how many tokens to draft for every row, so that tokens per second are expected to be most.

    A row yields 1 + p1 + .. + pk tokens from k drafts, of which the first i are all accepted with probability pi
    (Leviathan et al. 2023, arXiv:2211.17192, equation 1, where pi is a power of one acceptance).

    Args:
        chances: per row and draft that it may have, the probability that it and all before it are accepted.
        calls: times of the full model's calls.
        draft_share: time of one draft of all rows, as a share of a plain step's; 0 if drafts cost nothing.
        least_gain: how many times as many tokens a second drafts must promise, to be made at all.

    Returns:
        The largest number of drafts of a row; a row that may have fewer has fewer. 0 before a step's time is known.
    """
    best, most = 0, 0.0
    tokens, expected = len(chances), float(len(chances))
    plain = calls.of(tokens)
    if not plain:
        return 0
    for count in range(max(map(len, chances), default=0) + 1):
        if count:
            tokens += len(chances)  # rows with fewer drafts are padded
            expected += sum(row[count - 1] for row in chances if len(row) >= count)
        speed = expected / (calls.of(tokens) + count * draft_share * plain)
        if not count:
            most = speed * least_gain
        elif speed > most:
            best, most = count, speed
    return best


__all__ = ["HOPED_OF_DEPTH", "HOPED_OF_LOOKUP", "LATEST", "Acceptance", "CallTimes", "Trust", "best_count"]
