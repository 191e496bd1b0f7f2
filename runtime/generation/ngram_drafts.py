"""Draft by the row's own text or, where that knows less, by the bundle's table of short token sequences."""

from __future__ import annotations

from collections.abc import Sequence

from dynexport.runtime.bundle.ngrams import LONGEST_CONTEXT, NgramTable
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.draft_length import Trust
from dynexport.runtime.generation.drafts import DraftedRow, KnownTokens, PromptLookup, Proposal

# A chain of tokens ends where the table gives all of it together less than this.
_LEAST = 0.03
# So many times likelier must a token of the table be than one of the text itself: what was said goes on for longer.
_MUCH_LIKELIER = 1.5
# The share by which what a text and a model have seen of the table is forgotten at a token.
_FORGOTTEN_BY_TEXT, _FORGOTTEN_BY_MODEL = 0.02, 0.001
# How many expected tokens what is known before counts for: of a model's other texts in a text, of the table in a model.
_BEFORE_TEXT, _BEFORE_MODEL = 5.0, 20.0


class NgramLookup:
    """Drafts by the row's own text or by a table, whose probabilities are corrected by what came true.

    Every new token of a row is compared with what the table expected, drafted or not, so that the table is turned off
    and on at no cost.

    Args:
        table: the bundle's table.
    """

    def __init__(self, table: NgramTable) -> None:
        self._table, self._own = table, PromptLookup()
        self._trust = Trust(_FORGOTTEN_BY_MODEL, _BEFORE_MODEL)

    def proposals(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[Proposal]:
        """Return what followed each row's last tokens before, or what the table foresees.

        Several rows are not drafted for by the table: their calls are no longer bound by reading weights, and a further
        token costs more than such drafts yield (docs/speculation.md has the figures).
        """
        own = self._own.proposals(rows, most)
        if len(rows) > 1:
            return own
        for row in rows:
            self._compare(row.known)
        return [self._better(each, row.known, limit) for each, row, limit in zip(own, rows, most, strict=True)]

    def drafts(
        self, cache: KvCache, rows: Sequence[DraftedRow], proposals: Sequence[Proposal], counts: Sequence[int]
    ) -> list[list[int]]:
        """Return the first tokens of each proposal."""
        return self._own.drafts(cache, rows, proposals, counts)

    def _compare(self, known: KnownTokens) -> None:
        """Compare a row's tokens since the last step with what the table expected in their places."""
        trust = known.trust
        if trust is None:  # nothing but the prompt and a first token, which the table cannot be judged by
            known.trust, known.compared = Trust(_FORGOTTEN_BY_TEXT, _BEFORE_TEXT), len(known)
            return
        for place in range(known.compared, len(known)):
            *context, token = known[max(0, place - LONGEST_CONTEXT) : place + 1]
            found = self._table.likeliest(context)
            if found is not None:
                came = found[0] == token
                trust.add(found[1], came)
                self._trust.add(found[1], came)
        known.compared = len(known)

    def _better(self, own: Proposal, known: KnownTokens, most: int) -> Proposal:
        if own.chances and own.chances[0] * _MUCH_LIKELIER >= 1:
            return own
        foreseen = self._foreseen(known, most)
        if own.chances and (not foreseen.chances or own.chances[0] * _MUCH_LIKELIER >= foreseen.chances[0]):
            return own
        return foreseen

    def _foreseen(self, known: KnownTokens, most: int) -> Proposal:
        """Return the chain of tokens that the table foresees."""
        assert known.trust is not None
        ratio = known.trust.ratio(self._trust.ratio())
        context, chance, expected = known[-LONGEST_CONTEXT:], 1.0, 1.0
        tokens: list[int] = []
        chances: list[float] = []
        while len(tokens) < most and (found := self._table.likeliest(context)) is not None:
            token, probability = found
            expected *= probability
            if expected < _LEAST:
                break
            chance *= min(1.0, probability * ratio)
            tokens.append(token)
            chances.append(chance)
            context = [*context, token][-LONGEST_CONTEXT:]
        return Proposal(chances, tokens, foreseen=True)


__all__ = ["NgramLookup"]
