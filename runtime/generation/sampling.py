"""The sampling options of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynexport.runtime.bundle.checks import checked_count, checked_list, is_integer, is_number, shown
from dynexport.runtime.bundle.errors import DynexportError

MOST_LOGPROBS = 20
_MOST_BIASES = 1024
_MOST_WORDS = 1024
_MOST_IDS = 65_536
_LONGEST_NGRAM = 1024
_LARGEST_BIAS = 100


@dataclass(frozen=True)
class Sampling:
    """The options by which tokens are chosen; the defaults give greedy choice.

    Each step applies, in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty``,
    ``presence_penalty``, forbidden tokens. Greedy choice then takes the most probable token. A temperature above 0
    applies ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``typical_p`` and draws a token. Biases and penalties
    follow vLLM, so that an OpenAI request gives the same distribution; transformers has the same order for the fields
    that it has. The filters follow transformers, because generation_config.json comes from there; vLLM applies
    ``min_p`` before ``top_k`` and ``top_p``.

    Among equally probable tokens at the limit of ``top_k`` or ``top_p``, the lowest ids stay. So ``top_k`` is never
    exceeded, and ``top_k=1`` is greedy. transformers keeps all of them for ``top_k``, and does not define the order for
    ``top_p``.

    Attributes:
        temperature: 0 takes the most probable token; above 0 one is drawn from softmax(logits / temperature).
        top_p: keep the fewest most probable tokens whose total probability is at least this, 0 < top_p <= 1.
        top_k: keep this many of the most probable tokens, before ``top_p``; 0 keeps all.
        min_p: keep tokens at least ``min_p`` times as probable as the most probable one, after ``top_p``.
        typical_p: keep the fewest tokens whose information is nearest to the entropy and whose total probability is at
            least this (Meister et al. 2022, arXiv:2202.00666); 1 keeps all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or the
            generated text, 1e-6 to 1e6 (Keskar et al. 2019, arXiv:1909.05858); 1 is off, below 1 favours repeats.
        frequency_penalty: subtracted from a token's logit once per time that it was generated, -2 to 2 (OpenAI's API;
            the prompt does not count).
        presence_penalty: subtracted once from the logit of a token that was generated, -2 to 2.
        logit_bias: token id -> number that is added to its logit, -100 to 100; at most 1,024 ids.
        min_new_tokens: forbids end-of-sequence tokens before this many tokens were generated.
        suppress_tokens: ids that are never generated.
        begin_suppress_tokens: ids that are not generated as the first token.
        no_repeat_ngram_size: forbids a second occurrence of any sequence of this many tokens, the prompt included; 0 is
            off.
        bad_words_ids: sequences of ids that are never completed; an end-of-sequence token on its own is ignored here.
        seed: makes the draws repeatable; None takes fresh entropy.
        logprobs: None reports no log probabilities, 0 that of the chosen token, n <= 20 also the n most probable
            tokens. They are computed before biases, penalties, temperature and filters, as vLLM does by default
            (``raw_logprobs``).

    Raises:
        DynexportError: for a field outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    typical_p: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        temperature_fits = is_number(self.temperature) and self.temperature >= 0
        _check("temperature", self.temperature, temperature_fits, "a finite number >= 0")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _check(name, value, is_number(value) and 0 < value <= 1, f"0 < {name} <= 1")
        _check("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "an integer >= 0")
        _check("min_p", self.min_p, is_number(self.min_p) and 0 <= self.min_p <= 1, "0 <= min_p <= 1")
        penalty = self.repetition_penalty
        _check(
            "repetition_penalty", penalty, is_number(penalty) and 1e-6 <= penalty <= 1e6, "a number from 1e-6 to 1e6"
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(name, value, is_number(value) and -2 <= value <= 2, "a number from -2 to 2")
        seed_fits = self.seed is None or (is_integer(self.seed) and self.seed >= 0)
        _check("seed", self.seed, seed_fits, "an integer >= 0, or none")
        checked_count("min_new_tokens", self.min_new_tokens, 0)
        checked_count("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, _LONGEST_NGRAM)
        if self.logprobs is not None:
            checked_count("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        object.__setattr__(self, "bad_words_ids", _words("bad_words_ids", self.bad_words_ids))

    @property
    def adjusts(self) -> bool:
        """True if some option changes logits before a token is chosen."""
        return bool(
            self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
            or self.logit_bias
            or self.min_new_tokens
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.no_repeat_ngram_size
            or self.bad_words_ids
        )

    def check_ids(self, vocabulary: int) -> None:
        """Raise DynexportError for a token id outside a vocabulary of this size."""
        fields = {
            "logit_bias": self.logit_bias,
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
            "bad_words_ids": [token for word in self.bad_words_ids for token in word],
        }
        for name, ids in fields.items():
            largest = max(ids, default=0)
            _check(name, largest, largest < vocabulary, f"token ids 0..{vocabulary - 1}")


def _biases(value: Any) -> dict[int, float]:
    expected = "a mapping of token ids to numbers"
    _check("logit_bias", value, isinstance(value, Mapping), expected)
    _check("logit_bias", len(value), len(value) <= _MOST_BIASES, f"at most {_MOST_BIASES} token ids")
    for token, bias in value.items():
        _check("logit_bias", token, is_integer(token) and token >= 0, expected)
        fits = is_number(bias) and -_LARGEST_BIAS <= bias <= _LARGEST_BIAS
        _check(f"logit_bias: token {token}", bias, fits, f"a number from -{_LARGEST_BIAS} to {_LARGEST_BIAS}")
    return {int(token): float(bias) for token, bias in value.items()}


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = checked_list(name, value, "token ids")
    _check(name, len(ids), len(ids) <= _MOST_IDS, f"at most {_MOST_IDS} token ids")
    for token in ids:
        _check(name, token, is_integer(token) and token >= 0, "token ids")
    return tuple(map(int, ids))


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    words = checked_list(name, value, "lists of token ids")
    _check(name, len(words), len(words) <= _MOST_WORDS, f"at most {_MOST_WORDS} sequences")
    found = tuple(_ids(name, word) for word in words)
    _check(name, (), all(found), "sequences of at least one token id")
    return found


def _check(field: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise DynexportError(f"{field}: expected {expected}, found {shown(value)}")


__all__ = ["MOST_LOGPROBS", "Sampling"]
