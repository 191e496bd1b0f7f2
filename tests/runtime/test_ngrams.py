"""The n-gram table: what it learns beside a slow computation, hostile files, and drafts by it."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import change_manifest, contents, copied, dynexport, error_of, replace_file

from dynexport.exporter.bundle import drafting
from dynexport.exporter.bundle.drafting import store_ngrams
from dynexport.exporter.bundle.ngrams import learn_ngrams
from dynexport.runtime import Bundle, DynexportError, Model, Sampling, Speculation
from dynexport.runtime.bundle.ngrams import ENTRY_BYTES, NgramTable, context_keys, end_keys
from dynexport.runtime.generation.draft_length import Acceptance, CallTimes, best_count
from dynexport.runtime.generation.drafts import KnownTokens, Proposal
from dynexport.runtime.generation.ngram_drafts import NgramLookup

Array = np.ndarray
VOCABULARY = 80
HERE = Path("table.bin")


def spoken(seed: int, windows: int, size: int = 60, words: int = 12) -> list[Array]:
    """Windows of a language in which the last two words mostly decide on the next."""
    follows, generator = np.random.default_rng(0).integers(0, words, (words, words)), np.random.default_rng(seed)
    found = []
    for _ in range(windows):
        ids = generator.integers(0, words, size)
        for place in range(2, size):
            if generator.random() < 0.7:
                ids[place] = follows[ids[place - 2], ids[place - 1]]
        found.append(ids)
    return found


@dataclass
class Slow:
    """Interpolated absolute discounting, one probability at a time."""

    windows: Sequence[Array]
    counts: dict[tuple[int, ...], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def __post_init__(self) -> None:
        for ids in self.windows:
            seen = {tuple(ids[at - n : at + 1].tolist()) for n in range(5) for at in range(n, len(ids))}
            for *context, token in seen:
                self.counts[tuple(context)][token] += 1

    def chance(self, context: tuple[int, ...], token: int) -> float:
        after = self.counts[context]
        total = sum(after.values())
        found = max(after[token] - 0.8, 0) / total
        return found + (0.8 * len(after) / total * self.chance(context[1:], token) if context else 0.0)

    def best(self, context: tuple[int, ...]) -> float:
        return max(self.chance(context, token) for token in range(12))


def test_probabilities_are_those_of_interpolated_absolute_discounting() -> None:
    """Two windows, of which none is held out; a context that is not stored is told by a shorter one."""
    slow = Slow(spoken(1, 2))
    learned = learn_ngrams(slow.windows)
    assert learned is not None
    stored = 0
    for context in [each for each in slow.counts if each]:
        best, found = slow.best(context), learned.table.likeliest(context)
        own = any(
            int(key) == end_keys(context)[-1]
            for key in np.frombuffer(learned.table.content(), "<u8", len(learned.table))
        )
        stored += own
        if found is None:
            assert best < 0.1
        else:
            assert slow.chance(context, found[0]) == pytest.approx(best)
            assert abs(found[1] - best) < (0.5 / 255 + 1e-9 if own else 0.05 + 0.5 / 255)
    assert stored == len(learned.table) > 30


def test_probabilities_come_true_on_other_text_of_the_kind() -> None:
    learned = learn_ngrams(spoken(2, 50))
    assert learned is not None
    expected: list[float] = []
    real: list[bool] = []
    for ids in spoken(3, 30):
        for place in range(4, len(ids)):
            found = learned.table.likeliest(ids[place - 4 : place].tolist())
            if found is not None and found[1] > 0.3:
                expected.append(found[1])
                real.append(found[0] == ids[place])
    assert len(real) > 500 and abs(np.mean(real) - np.mean(expected)) < 0.06
    assert abs(learned.acceptance - np.mean(real)) < 0.2


def test_what_does_not_come_true_in_the_held_out_part_is_not_believed() -> None:
    generator = np.random.default_rng(5)
    windows = [generator.integers(0, 12, 60) if run % 5 == 2 else np.arange(60) % 12 for run in range(25)]
    learned = learn_ngrams(windows)
    assert learned is None or learned.acceptance < 0.2


def test_the_likeliest_entries_are_kept_where_there_is_not_room_for_all() -> None:
    windows = spoken(4, 20)
    whole, few = learn_ngrams(windows), learn_ngrams(windows, most=20)
    assert whole is not None and few is not None and len(few.table) == 20 < len(whole.table)
    assert learn_ngrams([]) is None and learn_ngrams([np.array([3])]) is None


def test_keys_are_those_of_the_documentation() -> None:
    contexts = np.array([[1, 2, 3], [0, 0, 49151]])
    for ids, key in zip(contexts.tolist(), context_keys(contexts).tolist(), strict=True):
        expected = 0x9E3779B97F4A7C15
        for token in ids[::-1]:
            expected = (expected ^ token) * 0x9E3779B97F4A7C15 % 2**64
            expected ^= expected >> 29
        assert key == end_keys(ids)[2] == expected


def content(keys: Sequence[int], tokens: Sequence[int], parts: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(keys)}Q{len(tokens)}i{len(parts)}B", *keys, *tokens, *parts)


@pytest.mark.parametrize(
    ("bad", "entries", "expected"),
    [
        (content([1, 2], [3, 4], [5, 6])[:-1], 2, "expected 26 bytes for 2 entries, found 25"),
        (content([1, 2], [3, 4], [5, 6]) + b"x", 2, "expected 26 bytes for 2 entries, found 27"),
        (content([2, 1], [3, 4], [5, 6]), 2, "expected ascending keys, found others"),
        (content([1, 1], [3, 4], [5, 6]), 2, "expected ascending keys, found others"),
        (content([1, 2], [3, VOCABULARY], [5, 6]), 2, "expected token ids 0..79, found 80"),
        (content([1, 2], [-1, 4], [5, 6]), 2, "expected token ids 0..79, found -1"),
        (content([1, 2], [3, 4], [5, 0]), 2, "expected probabilities of 1..255 parts, found 0"),
    ],
)
def test_hostile_tables(bad: bytes, entries: int, expected: str) -> None:
    with pytest.raises(DynexportError) as refused:
        NgramTable.parsed(bad, entries, VOCABULARY, HERE)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_changed_bytes_are_refused_or_a_table_of_the_vocabulary() -> None:
    learned, generator = learn_ngrams(spoken(1, 2)), np.random.default_rng(6)
    assert learned is not None
    good, entries = learned.table.content(), len(learned.table)
    assert NgramTable.parsed(good, entries, VOCABULARY, HERE).content() == good
    refused = 0
    for _ in range(300):
        changed = bytearray(good)
        for place in generator.integers(0, len(good), generator.integers(1, 4)):
            changed[place] = generator.integers(0, 256)
        try:
            table = NgramTable.parsed(bytes(changed), entries, VOCABULARY, HERE)
        except DynexportError as error:
            refused += "\n" not in str(error)
            continue
        for key in range(12):
            found = table.likeliest([key])
            assert found is None or (0 <= found[0] < VOCABULARY and 0 < found[1] <= 1)
    assert 0 < refused < 300


def row_of(ids: Sequence[int]) -> Any:
    return SimpleNamespace(known=KnownTokens(ids), acceptance=Acceptance())


def table_of(entries: dict[tuple[int, ...], tuple[int, int]]) -> NgramTable:
    """A table of contexts, their next tokens and 255ths."""
    by_key = sorted((end_keys(context)[-1], *said) for context, said in entries.items())
    return NgramTable(
        *(np.array(column, kind) for column, kind in zip(zip(*by_key, strict=True), ("u8", "i4", "u1"), strict=True))
    )


def test_drafts_are_a_chain_of_the_longest_contexts() -> None:
    lookup = NgramLookup(table_of({(2,): (3, 204), (2, 3): (4, 51), (3,): (9, 255), (4,): (5, 255)}))
    (found,) = lookup.proposals([row_of([7, 2])], [8])
    assert found.tokens == [3, 4, 5] and found.foreseen
    assert found.chances == pytest.approx([0.8, 0.8 * 0.2, 0.8 * 0.2])
    (found,) = lookup.proposals([row_of([7, 2])], [2])
    assert found.tokens == [3, 4]


def test_the_row_s_own_text_goes_first_unless_the_table_is_much_surer() -> None:
    said = [1, 2, 3, 1, 2]  # its own text goes on with 3, which is expected with 1/2
    for parts, own in ((255, False), (190, True)):
        (found,) = NgramLookup(table_of({(2,): (8, parts)})).proposals([row_of(said)], [3])
        assert (found.tokens[0] == 3) == own == (not found.foreseen)


def test_a_table_is_turned_off_by_a_text_that_it_does_not_foresee_and_on_again() -> None:
    """Without a draft: every token is compared with what the table expects."""
    calls = CallTimes()
    for tokens in range(1, 10):
        calls.add(tokens, 1 + 0.1 * tokens)
    lookup = NgramLookup(table_of({(token,): ((token + 1) % 40, 153) for token in range(40)}))

    def counted(row: Any, tokens: Sequence[int]) -> int:
        for token in tokens:
            lookup.proposals([row], [8])
            row.known.push(token)
        (found,) = lookup.proposals([row], [8])
        assert found.foreseen
        return best_count([found.chances], calls, 0.0)

    wrong = [(7 * index * index + index) % 40 for index in range(40)]
    row = row_of([0])
    assert counted(row, []) > 0
    assert counted(row, wrong) == 0
    assert counted(row_of([0]), []) > 0  # another text has not disproved it
    assert counted(row, [index % 40 for index in range(80)]) > 0
    for _ in range(30):
        other = row_of([0])
        counted(other, wrong)
    assert counted(row_of([0]), []) == 0  # all texts have


def test_a_table_s_drafts_do_not_change_what_is_known_of_a_text_s_own() -> None:
    seen = Acceptance()
    seen.add(4, 0, foreseen=True)
    assert (seen.rate, seen.drafted, seen.accepted) == (Acceptance().rate, 4, 0)


PROMPTS = [[5], [7, 8, 9, 10, 11], [60, 61, 62]]


@pytest.fixture(scope="module")
def tabled(generator: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model with a table of its own answers."""
    answers = generator.generate(PROMPTS, max_new_tokens=40, depth="full")
    windows = [np.array([*prompt, *each.ids]) for prompt, each in zip(PROMPTS, answers, strict=True)][:2]
    learned = learn_ngrams(windows)
    assert learned is not None
    path = copied(generator.bundle.path, tmp_path_factory.mktemp("tabled") / "bundle")
    stored = store_ngrams(Bundle.open(path), learned, sum(map(len, windows)))
    model = Model(Bundle.open(path), threads=1)
    assert model.bundle.manifest.ngrams == stored and stored.entries == len(learned.table)
    return model


def test_a_table_changes_no_token_and_foresees_what_it_was_learned_from(tabled: Model, generator: Model) -> None:
    for sampling in (Sampling(), Sampling(temperature=0.7, seed=11, top_p=0.9)):
        how: Any = {"max_new_tokens": 40, "depth": "full", "sampling": sampling}
        plain = generator.generate(PROMPTS, **how)
        for speculation in (Speculation(), Speculation(4, always=True)):
            for prompts, expected in ((PROMPTS, plain), (PROMPTS[:1], plain[:1])):
                assert tabled.generate(prompts, **how, speculation=speculation) == expected
    accepted = []
    for model in (generator, tabled):
        how = {"max_new_tokens": 40, "depth": "full", "speculation": Speculation(4, always=True)}
        alone = [piece for prompt in PROMPTS[:2] for piece in model.stream([prompt], **how)]
        accepted.append(sum(piece.draft == piece.token for piece in alone))
    assert accepted[1] > accepted[0] + 10


def test_a_table_that_is_not_one_is_refused(tabled: Model, tmp_path: Path) -> None:
    manifest = tabled.bundle.manifest
    assert manifest.ngrams is not None
    path, name = copied(tabled.bundle.path, tmp_path / "bundle"), manifest.ngrams.file
    replace_file(path, name, (path / name).read_bytes()[:-ENTRY_BYTES])
    ran = dynexport("run", path, "--ids", "1,2", "--speculate")
    assert f"bytes for {manifest.ngrams.entries} entries" in error_of(ran)
    change_manifest(path, lambda fields: fields["files"].pop(name))
    assert f"drafting.ngrams: expected its file {name} among files, found none" in error_of(
        dynexport("run", path, "--ids", "1,2")
    )


def test_calibrate_stores_a_table_and_replaces_it(skip_bundle: Path, tmp_path: Path) -> None:
    path, texts = copied(skip_bundle, tmp_path / "bundle"), [tmp_path / "one.txt", tmp_path / "two.txt"]
    for number, text in enumerate(texts):
        text.write_text("".join("abcdefghij klm"[number + index % 7] for index in range(400)))
    before, names = contents(path), []
    for given in (texts[:1], texts):
        arguments = [part for text in given for part in ("--ngrams", text)]
        ran = dynexport("calibrate", path, *arguments, "--window", 16, "--json", "-")
        assert ran.code == 0, ran.err
        found = Bundle.open(path).manifest.ngrams
        assert found is not None and ran.report["ngrams"]["entries"] == found.entries
        assert found.acceptance > 0.9 and found.tokens >= 400 * len(given) * 0.9
        names.append(found.file)
        after = contents(path)
        assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == {
            "manifest.json",
            names[-1],
        }
    assert names[0] != names[1]
    shown = dynexport("inspect", path, "--json", "-")
    assert shown.report["drafting"]["ngrams"]["file"] == names[1]
    assert f"{found.entries} from {found.tokens} tokens" in " ".join(dynexport("inspect", path).out.split())
    asked = ["--prompt", "abcabc", "--max-new-tokens", 20, "--threads", 1, "--json", "-"]
    plain, drafted = (dynexport("run", path, *asked, *more).report["ids"] for more in ([], ["--speculate"]))
    assert plain == drafted


def test_a_text_without_anything_to_learn_and_other_wrong_calls(skip_bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    before = contents(skip_bundle)
    ran = dynexport("calibrate", skip_bundle, "--ngrams", empty)
    assert "ngrams: expected texts in which some tokens follow others again, found 0 tokens" in error_of(ran)
    both = dynexport("calibrate", skip_bundle, "--ngrams", empty, "--text", empty)
    assert "expected --text TEXT, or --speculate TEXT, --ngrams TEXT or both" in error_of(both)
    assert contents(skip_bundle) == before


def test_a_bundle_whose_manifest_cannot_be_written_keeps_its_table(
    tabled: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(tabled.bundle.path, tmp_path / "bundle")
    before, write = Bundle.open(path), drafting.write_file

    def full(where: Path, what: bytes) -> None:
        if where.name == "manifest.json":
            raise OSError(28, "No space left on device")
        write(where, what)

    monkeypatch.setattr(drafting, "write_file", full)
    learned = learn_ngrams(spoken(1, 2))
    assert learned is not None
    with pytest.raises(DynexportError, match=r"manifest\.json: expected a file to write"):
        store_ngrams(before, learned, 120)
    assert Bundle.open(path).manifest == before.manifest
    monkeypatch.setattr(drafting, "write_file", write)
    new = store_ngrams(before, learned, 120)
    assert [each.name for each in path.glob("ngrams-*")] == [new.file]
    NgramTable.of_bundle(Bundle.open(path))


def test_a_proposal_of_one_rate() -> None:
    assert Proposal.alike(0.5, 3).chances == [0.5, 0.25, 0.125]
