"""The data of a trace: tokens with their share of the text, and what a log becomes."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dynexport.exporter.trace import RoutedLayer, RowDepth, Token, Trace
from dynexport.runtime.bundle.manifest import FULL, LayerRouting, PathRouting
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.text.text import Text


def bytes_of_text() -> Text:
    """A tokenizer with a token for every byte, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return Text.from_files({"tokenizer.json": tokenizer.to_str().encode()})


def test_the_texts_of_tokens_are_the_text() -> None:
    text = bytes_of_text()
    words = "a 🙂<end>\n"
    ids = text.encode(words)
    tokens = Token.sequence(ids, text, 2)
    assert [token.id for token in tokens] == ids
    assert [token.text for token in tokens] == ["a", " ", "", "", "", "🙂", "<end>", "\n"]
    assert [token.is_prompt for token in tokens] == [True] * 2 + [False] * 6


def test_a_text_that_ends_within_a_character() -> None:
    text = bytes_of_text()
    tokens = Token.sequence(text.encode("é")[:1], text, 1)
    assert [token.text for token in tokens] == ["\ufffd"]


def test_tokens_without_a_tokenizer_have_no_text() -> None:
    tokens = Token.sequence([5, 6], Text.from_files({}), 1)
    assert [(token.id, token.text, token.is_prompt) for token in tokens] == [(5, None, True), (6, None, False)]


ROUTING = LayerRouting(layers=(1,), overflow="residual")


def decisions(tokens: int) -> Decisions:
    """Of three layers, of which 1 is routed and runs every other token."""
    places = np.arange(tokens)
    ran = np.ones((3, tokens), bool)
    ran[1] = places % 2 == 0
    margins = np.where(places == 0, np.inf, 1)[None].astype(np.float32)
    scores = places[None].astype(np.float32)
    return Decisions(ran, ran[1:2].astype(np.int64), scores, margins, np.array([4]))


def trace_of(made: Decisions, tokens: int) -> Trace:
    parts = [Token(id=i, text=None, is_prompt=i < 3) for i in range(tokens)]
    return Trace.of(made, ROUTING, parts, strategy="mod", speedup=FULL)


def test_what_was_decided_of_every_token() -> None:
    trace = trace_of(decisions(5), 5)
    assert trace.ran == ((True,) * 5, (True, False, True, False, True), (True,) * 5)
    assert trace.depth == (3, 2, 3, 2, 3)
    assert trace.layers_per_token == 2.6
    assert trace.prompt_tokens == 3
    assert trace.scores == ((0, 1, 2, 3, 4),)


def test_how_deep_a_row_went() -> None:
    found = RowDepth.of(decisions(5), ROUTING)
    assert found == RowDepth(
        tokens=5, layers=3, layers_per_token=2.6, routed=(RoutedLayer(layer=1, rate=0.6, overflow=4),)
    )


def test_a_path_that_comes_back_counts_every_time() -> None:
    """One token takes layer 1 three times, one is turned away and then leaves."""
    routing = PathRouting(hops=3, min_hops=0, exit=True, reuse=True, places="layers")
    path = np.array([[1, -2], [1, 2], [1, -1]])
    ran = np.array([[False, False], [True, False]])
    scores = np.zeros(path.shape, np.float32)
    found = RowDepth.of(Decisions(ran, path, scores, scores, np.array([1])), routing)
    assert (found.layers_per_token, found.routed, found.turned_away) == (1.5, (), 1)


def test_json_has_null_for_what_is_not_finite_and_is_read_back() -> None:
    trace = trace_of(decisions(5), 5)
    assert json.loads(trace.model_dump_json())["margins"] == [[None, 1, 1, 1, 1]]
    assert Trace.model_validate_json(trace.model_dump_json()) == trace


@pytest.mark.parametrize("tokens", [4, 6])
def test_decisions_of_other_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"expected {tokens} tokens, found 5"):
        trace_of(decisions(5), tokens)


def test_a_row_of_which_no_layer_is_routed(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(2, [], 1, 1)
    assert (trace.routed, trace.scores, trace.margins, trace.depth) == ((), (), (), (2, 2))
