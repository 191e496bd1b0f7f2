"""Generation: why and when a row ends, and that it ends alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from dynexport.runtime import Bundle, DynexportError, Generation, Model, Sampling
from dynexport.runtime.execution.batch import StepResult
from dynexport.runtime.text.text import Text

PROMPTS = [[5], [7, 8, 9, 10, 11], [60, 61, 62]]
NEW = 12


def with_eos(generator: Model, *eos: int) -> Model:
    """The same model, ending at other tokens."""
    manifest = generator.bundle.manifest
    tokens = manifest.tokens.model_copy(update={"eos": eos})
    return Model(Bundle(generator.bundle.path, manifest.model_copy(update={"tokens": tokens})), threads=1)


def greedy(generator: Model) -> list[Generation]:
    return generator.generate(PROMPTS, max_new_tokens=NEW)


def test_rows_end_at_their_own_time_as_they_would_alone(generator: Model) -> None:
    free = greedy(generator)
    ends = with_eos(generator, free[0].ids[2], free[1].ids[5])
    together = ends.generate(PROMPTS, max_new_tokens=NEW)
    alone = [ends.generate([prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({len(row.ids) for row in together}) > 1
    for row, before in zip(together, free, strict=True):
        assert row.ids == before.ids[: len(row.ids)]


def test_the_penalty_of_repetition_knows_the_prompt_and_the_answer(generator: Model) -> None:
    never = Sampling(repetition_penalty=1e6)
    rows = generator.generate(PROMPTS, max_new_tokens=NEW, sampling=never)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len({*prompt, *row.ids}) == len(prompt) + len(row.ids)
        assert row == generator.generate([prompt], max_new_tokens=NEW, sampling=never)[0]
    most = list(range(80))
    (free,), (new,) = (generator.generate([most], max_new_tokens=1, sampling=how) for how in (Sampling(), never))
    assert free.ids[0] in most and new.ids[0] not in most


def test_any_token_of_the_end_set_ends_a_row_and_is_not_text(generator: Model) -> None:
    (free,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW)
    for index in (1, 4):
        end = free.ids[index]
        (row,) = with_eos(generator, 88, end).generate(PROMPTS[:1], max_new_tokens=NEW)
        assert row.finish_reason == "stop"
        assert row.ids == free.ids[: free.ids.index(end) + 1]
        assert row.text == generator.text.decode(row.ids[:-1])


def test_a_stop_string_ends_a_row_before_it(generator: Model) -> None:
    (free,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW)
    stop = free.text[4:7]
    (row,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW, stop=["never there", stop])
    assert row.finish_reason == "stop"
    assert row.text == free.text[: free.text.index(stop)]
    assert row.ids == free.ids[: len(row.ids)] and len(row.ids) < NEW


def test_an_unfinished_stop_string_is_text(generator: Model) -> None:
    (free,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW)
    (row,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW, stop=[free.text[-3:] + "and more"])
    assert (row.text, row.finish_reason) == (free.text, "length")


def spelling(generator: Model, monkeypatch: pytest.MonkeyPatch, answer: bytes, *eos: int) -> Model:
    """A model that answers with these bytes, one a token; the end tokens are among them."""
    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, []))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    logits = iter(np.eye(256, dtype=np.float32)[list(answer)][:, None])
    speller = with_eos(generator, *eos)
    speller.text = Text.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    none = np.zeros((1, 1), np.int64)
    monkeypatch.setattr(speller.executor, "run", lambda cache, batch: StepResult([next(logits)], none, None))
    monkeypatch.setattr(speller.executor, "decode", lambda *arguments, lasting: next(logits))
    return speller


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        ("hé🎉".encode(), "hé🎉", "length"),
        ("h🎉".encode()[:-1], "h\ufffd\ufffd\ufffd", "length"),
        ("h🎉".encode()[:-1] + b"\xff", "h\ufffd\ufffd\ufffd", "stop"),
        ("é".encode()[:1], "\ufffd", "length"),
    ],
)
def test_unfinished_bytes_at_the_end_of_a_text_are_shown(
    generator: Model, monkeypatch: pytest.MonkeyPatch, answer: bytes, text: str, reason: str
) -> None:
    (row,) = spelling(generator, monkeypatch, answer, 0xFF).generate([[5]], max_new_tokens=len(answer))
    assert (row.text, row.ids, row.finish_reason) == (text, list(answer), reason)


def test_unfinished_bytes_may_complete_a_stop_string(generator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    speller = spelling(generator, monkeypatch, b"ab\xc3")
    (row,) = speller.generate([[5]], max_new_tokens=3, stop=["b\ufffd"])
    assert (row.text, row.finish_reason) == ("a", "stop")


def test_answers_in_a_chat_end_at_more_tokens(generator: Model) -> None:
    (free,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW)
    manifest = generator.bundle.manifest
    tokens = manifest.tokens.model_copy(update={"eos": (), "turn_end": (free.ids[2],)})
    bundle = Bundle(generator.bundle.path, manifest.model_copy(update={"tokens": tokens}))
    other = Model(bundle, threads=1)
    assert other.generate(PROMPTS[:1], max_new_tokens=NEW)[0].ids == free.ids
    (row,) = other.generate(PROMPTS[:1], max_new_tokens=NEW, chat=True)
    assert (row.ids, row.finish_reason) == (free.ids[: free.ids.index(free.ids[2]) + 1], "stop")


def test_the_pieces_of_a_stream_are_the_generation(generator: Model) -> None:
    done = greedy(generator)
    pieces = list(generator.stream(PROMPTS, max_new_tokens=NEW))
    for index, row in enumerate(done):
        own = [piece for piece in pieces if piece.row == index]
        assert [piece.token for piece in own] == row.ids
        assert "".join(piece.text for piece in own) == row.text
        assert [piece.finish_reason for piece in own] == [None] * (NEW - 1) + ["length"]


@pytest.mark.parametrize(
    ("prompt", "new", "generated", "reason"),
    [
        (24, 5, 1, "length"),
        (23, 5, 2, "length"),
        (20, 5, 5, "length"),
        (20, 4, 4, "length"),
        (20, 1 << 40, 5, "length"),
        (24, 1, 1, "length"),
    ],
)
def test_the_context_of_24_ends_a_row(short: Model, prompt: int, new: int, generated: int, reason: str) -> None:
    (row,) = short.generate([[1] * prompt], max_new_tokens=new)
    assert (len(row.ids), row.finish_reason, row.prompt_tokens) == (generated, reason, prompt)


def test_a_row_at_the_end_of_its_context_leaves_the_others_room(short: Model) -> None:
    long, small = short.generate([[1] * 23, [2] * 3], max_new_tokens=10)
    assert (len(long.ids), long.finish_reason) == (2, "length")
    assert small == short.generate([[2] * 3], max_new_tokens=10)[0]
    assert (len(small.ids), small.finish_reason) == (10, "length")


def test_a_seed_repeats_whoever_the_neighbours_are(generator: Model) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=3)
    alone = generator.generate(PROMPTS[:1], max_new_tokens=NEW, sampling=sampling)
    assert generator.generate(PROMPTS[:1], max_new_tokens=NEW, sampling=sampling) == alone
    assert generator.generate(PROMPTS, max_new_tokens=NEW, sampling=sampling)[0] == alone[0]
    assert generator.generate([PROMPTS[0], [1, 2]], max_new_tokens=NEW, sampling=sampling)[0] == alone[0]
    other = Sampling(temperature=1.5, top_p=0.9, seed=4)
    assert generator.generate(PROMPTS[:1], max_new_tokens=NEW, sampling=other) != alone


def test_one_request_after_another_at_any_ratio(generator: Model) -> None:
    first = {ratio: generator.generate(PROMPTS, max_new_tokens=NEW, depth=ratio) for ratio in (1, 2)}
    assert first[1] != first[2]
    for ratio in (2, 1, 1, 2):
        assert generator.generate(PROMPTS, max_new_tokens=NEW, depth=ratio) == first[ratio]
    assert greedy(generator) == first[2], "the default is the first ratio of the bundle"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one, found none"),
        ({"prompts": [[]]}, "prompt: expected at least one token, found none"),
        ({"prompts": [[1], [89]]}, r"prompt: expected token ids 0\.\.88, found 89"),
        ({"prompts": [[1] * 25]}, "prompt: expected at most 24 tokens to fit the context of 24, found 25"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ({"depth": 3}, r"depth: expected 1, 2, 1\.5; found 3"),
        ({"depth": "fast"}, r"depth: expected 1, 2, 1\.5; found fast"),
        ({"stop": ["x"]}, "stop: expected a bundle with a tokenizer"),
    ],
)
def test_bad_arguments(short: Model, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DynexportError, match=message):
        short.generate(**{"prompts": [[1]], **arguments})


def test_a_model_without_a_tokenizer_gives_ids(dense_bundle: Path) -> None:
    (row,) = Model(Bundle.open(dense_bundle), threads=1).generate([[1]], max_new_tokens=3)
    assert len(row.ids) == 3 and row.text == ""
