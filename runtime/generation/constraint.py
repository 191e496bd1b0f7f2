"""Limit an answer to JSON texts that a schema allows: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.bundle.checks import checked_kind
from dynexport.runtime.bundle.errors import DynexportError, require_module, told_as
from dynexport.runtime.bundle.json_text import parse_json
from dynexport.runtime.bundle.limited_process import run_limited
from dynexport.runtime.generation import schema_process
from dynexport.runtime.text.text import Text

_LONGEST_SCHEMA = 64 << 10  # characters
_SECONDS = 1  # CPU time to compile a schema; an ordinary one takes a thousandth of it
_KEPT = 16  # compiled schemas of a tokenizer
_MOST_STATES = 25_000  # of an answer's lexer, about 2 KB each
_ANY_OBJECT = {"type": "object"}
# One space, or a line break and its indentation: without a bound, a model may write white space without end.
_OPTIONS = {"whitespace_pattern": r"\x20|\r?\n[\x20\t]{0,64}"}
# llguidance would otherwise allow only the tokens that its own tokenizer chooses where the text is determined.
_GRAMMAR = '%llguidance {"no_forcing": true}\nstart: %json '


class Constraint:
    """The state of one answer that has to be a JSON text.

    A text is complete when it is valid JSON and fulfils the schema. ``masked`` allows the tokens that continue some
    complete text, and an end-of-sequence token only after one.

    Attributes:
        complete: true if the text is complete and no token can continue it.
    """

    def __init__(self, matcher: Any, tokens: int) -> None:
        """Take llguidance's matcher and the tokenizer's vocabulary size; use ``json_schema`` instead."""
        self._matcher, self._tokens = matcher, tokens
        self.complete = False

    @classmethod
    def json_schema(cls, text: Text, schema: Mapping[str, Any]) -> Constraint:
        """Return the constraint of one answer to the texts that a schema allows.

        A schema is compiled once per tokenizer; the 16 most recent ones are kept.

        Args:
            text: the tokenizer.
            schema: a JSON schema, as JSON values.

        Raises:
            DynexportError: without llguidance or a tokenizer, for a schema that is too large, that is not one, or that
                has keywords which llguidance does not support.
        """
        return _grammars(text).constraint(_written(schema))

    @classmethod
    def json_object(cls, text: Text) -> Constraint:
        """Return the constraint of one answer to JSON objects. Raises DynexportError as ``json_schema``."""
        return cls.json_schema(text, _ANY_OBJECT)

    def masked(self, logits: NDArray[np.float32], ends: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of the logits with minus infinity for the tokens that are not allowed.

        Args:
            logits: float32 [vocab].
            ends: int64 [n], ids that end the answer: allowed after a complete text, and only there.

        Raises:
            DynexportError: when the text cannot be completed, or the schema is too complex to continue it.
        """
        bits = np.frombuffer(_next_mask(self._matcher), np.uint8)
        known = min(self._tokens, logits.size)
        allowed = np.unpackbits(bits, count=known, bitorder="little").view(np.bool_)
        masked = np.full_like(logits, -np.inf)
        np.copyto(masked[:known], logits[:known], where=allowed)
        ends = ends[ends < logits.size]
        masked[ends] = logits[ends] if self._matcher.is_accepting() else -np.inf
        return masked

    def push(self, token: int) -> None:
        """Add a token that ``masked`` allows and that does not end the answer.

        Raises:
            DynexportError: for a token that is not allowed.
        """
        if not self._matcher.consume_token(token):
            raise _refusal(self._matcher.get_error() or f"token {token} is not allowed here")
        self.complete = self._matcher.is_stopped() and self._matcher.is_accepting()


class _Grammars:
    """The compiled schemas of one tokenizer; several threads may share them."""

    def __init__(self, text: Text) -> None:
        library: Any = require_module("llguidance", "structured", "limit an answer to a JSON schema")
        words = text.token_bytes()
        self._tokens = len(words)
        with told_as("llguidance: cannot use the bundle's tokenizer"):
            self._tokenizer = library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(words)))
        self._library = library
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock, self._compiling = threading.Lock(), threading.Lock()

    def constraint(self, schema: str) -> Constraint:
        """Return the constraint of one answer to a schema. Raises DynexportError as ``Constraint.json_schema``."""
        found = self._known(schema)
        if found is None:
            with self._compiling:  # one at a time: many at once would take the processors from the engine
                found = self._known(schema) or self._kept(schema, self._compile(_GRAMMAR + schema))
        return Constraint(found.deep_copy(), self._tokens)

    def _known(self, schema: str) -> Any:
        with self._lock:
            if schema in self._compiled:
                self._compiled.move_to_end(schema)
            return self._compiled.get(schema)

    def _kept(self, schema: str, matcher: Any) -> Any:
        with self._lock:
            self._compiled[schema] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, grammar: str) -> Any:
        answer = run_limited(schema_process.__file__, ("llguidance",), _SECONDS, {"grammar": grammar})
        if "error" in answer:
            raise _refusal(answer["error"])
        limits = self._library.LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        _next_mask(matcher.deep_copy())  # finds out now whether there is a first token
        return matcher


class _Vocabulary:
    """A vocabulary as llguidance takes it, with one more token that stands for all ends."""

    def __init__(self, words: Sequence[bytes]) -> None:
        self.tokens = [*words, b"<end>"]
        self.eos_token_id, self.bos_token_id = len(words), None
        self.special_token_ids = [len(words)]

    def __call__(self, text: bytes) -> list[int]:
        """Refuse to tokenize: no grammar of ours needs it."""
        raise NotImplementedError


_OF_TOKENIZERS: WeakKeyDictionary[Text, _Grammars] = WeakKeyDictionary()
_FINDING = threading.Lock()


def _grammars(text: Text) -> _Grammars:
    checked_kind("text", text, Text, "a Text")
    with _FINDING:
        if text not in _OF_TOKENIZERS:
            _OF_TOKENIZERS[text] = _Grammars(text)
        return _OF_TOKENIZERS[text]


def _written(schema: Mapping[str, Any]) -> str:
    """Return a schema's JSON text with the options of llguidance. Raises DynexportError for one that is no JSON."""
    checked_kind("schema", schema, Mapping, "a JSON schema, as a mapping")
    if "x-guidance" in schema:
        raise DynexportError("schema: expected keywords of JSON schema, found x-guidance; leave it out")
    with told_as("schema: expected JSON values"):
        written = json.dumps({**schema, "x-guidance": _OPTIONS}, allow_nan=False)
    if len(written) > _LONGEST_SCHEMA:
        raise DynexportError(f"schema: expected at most {_LONGEST_SCHEMA} characters, found {len(written)}")
    parse_json(written, "schema")
    return written


def _next_mask(matcher: Any) -> bytes:
    """Return one bit per token, set if it may come next. Raises DynexportError if the text cannot be completed."""
    bits: bytes = matcher.compute_bitmask()
    if matcher.is_error() or not (matcher.is_accepting() or any(bits)):
        problem = matcher.get_error()
        stuck = not problem or problem.startswith("NoExtension")
        raise _refusal("the vocabulary has no token that continues the text" if stuck else problem)
    return bits


def _refusal(problem: str) -> DynexportError:
    # llguidance quotes the grammar after the reason, and names a place in it before.
    reason = " ".join(problem.partition(" 1 | %llguidance")[0].removesuffix("<non-verbose/>").split())
    reason = reason.rpartition("failed to compile JSON schema: ")[2]
    return DynexportError(f"schema: expected one that llguidance can follow, found a problem: {reason:.300}")


__all__ = ["Constraint"]
