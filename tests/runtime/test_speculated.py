"""What is measured of drafts: counted again from the tokens; what is chosen, stored, and used by the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import change_manifest, contents, copied, dense_bundle, dynexport, error_of  # noqa: F401 - fixtures

from dynexport.exporter.bundle import drafting
from dynexport.exporter.cli.speculation_options import asked_speculation
from dynexport.runtime import Bundle, DynexportError, Model, Speculation
from dynexport.runtime.bundle.drafting import Drafting
from dynexport.runtime.measure import draft_choice
from dynexport.runtime.measure.draft_layers import DraftLayers
from dynexport.runtime.measure.speculated import DraftedWork, measure_drafts

PROMPTS = [[[5, 6, 7, 8], [9, 8, 7, 6]], [[1, 2, 3, 4], [60, 61, 62, 63]]]
NEW = 12


def test_what_is_counted_is_what_the_steps_were(generator: Model) -> None:
    """Three drafts a step that the full model makes itself: three steps of four tokens."""
    manifest = generator.bundle.manifest
    work = DraftedWork(PROMPTS, 1 + 3 * 4, manifest.full, repeats=2)
    (found,) = measure_drafts(generator, work, [Speculation(3, manifest.full, always=True)])
    assert (found.drafter, found.most, found.texts, found.same_texts) == ("full", 3, 8, 8)
    assert (found.accepted, found.rejected, found.acceptance) == (2 * 4 * 9, 0, 1.0)
    assert found.tokens_per_step == found.ideal_gain == 4
    assert found.gain > 0 and found.efficiency == pytest.approx(found.gain / 4)
    assert found.gain_quartiles[0] <= found.gain <= found.gain_quartiles[1]


def test_without_drafts_a_step_is_a_token(generator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynexport.runtime.generation.speculation.best_count", lambda *_: 0)
    work = DraftedWork(PROMPTS, NEW, generator.bundle.manifest.full, repeats=1)
    (found,) = measure_drafts(generator, work, [Speculation()])
    assert (found.acceptance, found.accepted, found.tokens_per_step, found.ideal_gain) == (None, 0, 1, 1)


def test_answers_of_one_token_have_nothing_to_time(generator: Model) -> None:
    first = generator.generate([1, 2, 3], max_new_tokens=1).ids[0]
    eos = generator.bundle.manifest.tokens.model_copy(update={"eos": (first,)})
    ends = Model(Bundle(generator.bundle.path, generator.bundle.manifest.model_copy(update={"tokens": eos})), threads=1)
    with pytest.raises(DynexportError, match="prompts: expected some with answers of at least 2 tokens, found none"):
        measure_drafts(ends, DraftedWork([[[1, 2, 3]]], NEW, ends.bundle.manifest.full, 1), [Speculation()])
    with pytest.raises(DynexportError, match="new_tokens: expected"):
        DraftedWork(PROMPTS, 1, ends.bundle.manifest.full)


def test_layers_are_left_out_by_the_harm_that_it_does(generator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an agreement that is planted: layers 2 and 5 do not matter, each other one is worth a quarter."""
    layers = DraftLayers(generator.executor, [np.array([1, 2, 3])], [[4, 5, 6]])
    everything = set(range(generator.bundle.manifest.model.layers))
    assert layers.agreement(sorted(everything)) in (0.0, 0.5, 1.0)
    monkeypatch.setattr(layers, "agreement", lambda keep: 0.75 ** len(everything - {2, 5} - set(keep)))
    steps: list[tuple[int, int]] = []
    depth, rate = layers.search(lambda done, total: steps.append((done, total)))
    assert (set(depth.keep), rate) == (everything - {2, 5}, 1.0)
    assert steps[-1] == (15, 15) and depth.prompt == tuple(sorted(everything))


def test_the_full_model_agrees_with_itself(generator: Model) -> None:
    answers = [each.ids for each in generator.generate([[1, 2, 3], [7, 8, 9]], max_new_tokens=9, depth="full")]
    layers = DraftLayers(generator.executor, [np.array([1, 2, 3]), np.array([7, 8, 9])], answers)
    assert layers.agreement(range(generator.bundle.manifest.model.layers)) == 1.0


@pytest.fixture(scope="module")
def calibrated(skip_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle after the command; what it chose depends on the clock."""
    home = tmp_path_factory.mktemp("drafts")
    bundle, text = copied(skip_bundle, home / "bundle"), home / "text.txt"
    text.write_text("abcdefghij klm " * 40)
    before = contents(bundle)
    with pytest.MonkeyPatch.context() as patch:  # less work than for a user
        patch.setattr(draft_choice, "_PROMPTS", 2)
        patch.setattr(draft_choice, "_NEW", 12)
        sizes = ["--window", 16, "--threads", 1, "--json", home / "report.json"]
        ran = dynexport("calibrate", bundle, "--speculate", text, *sizes)
    assert ran.code == 0, ran.err
    after, report = contents(bundle), json.loads((home / "report.json").read_text())
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {"manifest.json"}
    assert {"prompt lookup", "2", "draft"} <= {each["drafter"] for each in report["measured"]}
    assert Bundle.open(bundle).manifest.drafting == Drafting(**report["drafting"])
    assert "--speculate without a number now drafts up to" in " ".join(ran.out.split())
    return bundle


def stored(bundle: Path, directory: Path, **fields: object) -> Path:
    """A copy of a bundle whose manifest says how tokens are drafted."""
    path = copied(bundle, directory)
    change_manifest(path, lambda manifest: manifest.update(drafting={"most": 3, "gain": 1.5, **fields}))
    return path


def test_speculate_without_a_number_is_what_the_bundle_says(calibrated: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(stored(calibrated, tmp_path / "declared", keep=[0, 2, 4, 7])).manifest
    assert Speculation.of(manifest) == Speculation(3, manifest.depths[0])
    searched = stored(calibrated, tmp_path / "searched", keep=[0, 1, 2, 5, 7])
    at_it = asked_speculation(Bundle.open(tmp_path / "declared"), "measured", None, manifest.depths[0])
    assert at_it == Speculation(3)  # the depth that verifies is the one that would draft
    own = Speculation.of(Bundle.open(searched).manifest)
    assert own.depth is not None and (own.most, own.depth.name, own.depth.keep) == (3, "draft", (0, 1, 2, 5, 7))
    assert Speculation.of(Bundle.open(stored(calibrated, tmp_path / "lookup")).manifest) == Speculation(3)
    arguments = ["--prompt", "abc abc", "--max-new-tokens", 30, "--threads", 1, "--json", "-"]
    plain = dynexport("run", searched, *arguments).report
    drafted = dynexport("run", searched, *arguments, "--speculate")
    assert drafted.code == 0 and drafted.report["ids"] == plain["ids"]


def test_layers_that_no_graph_can_choose_are_refused(dense_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    bundle = stored(dense_bundle, tmp_path / "bundle", keep=[0, 1])
    ran = dynexport("run", bundle, "--ids", "1,2", "--speculate")
    assert "drafting: expected the layers of a depth, as no graph of the bundle chooses layers" in error_of(ran)


@pytest.mark.parametrize("arguments", [[], ["--draft", "2", "--batch", 2]])
def test_bench_compares_drafts_with_none(arguments: list[object], skip_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc def abc def " * 8)
    sizes = ["--prompt-tokens", 16, "--new-tokens", 12, "--repeats", 1, "--threads", 1]
    ran = dynexport("bench", skip_bundle, "--speculate", 4, *arguments, "--text", text, *sizes, "--json", "-")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["drafter"] == ("2" if arguments else "prompt lookup") and found["most"] == 4
    assert found["texts"] == found["same_texts"] == 4 * (2 if arguments else 1)
    shown = dynexport("bench", skip_bundle, "--speculate", 4, *arguments, *sizes)
    assert "random prompts: their continuations say little of a text's drafts; give --text" in " ".join(
        shown.err.split()
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--speculate", 0], "--speculate: expected a number of drafts, 1..64, found 0"),
        (["--speculate", 65], "--speculate: expected a number of drafts, 1..64, found 65"),
        (["--speculate", "many"], "--speculate: expected a number of drafts, 1..64, found many"),
        (["--speculate", "9" * 5000], "--speculate: expected a number of drafts, 1..64, found 9999"),
        (["--draft", "2"], "--draft: expected with --speculate, found without"),
        (["--speculate", "--draft", "3"], "depth: expected 1, 2; found 3"),
        (
            ["--speculate", "--draft", "1", "--speedup", "1"],
            "--draft: expected a depth of fewer layers than full (8), ",
        ),
        (["--speculate", "--draft", "2", "--speedup", "2"], "expected a depth of fewer layers than 2 (4), which"),
    ],
)
def test_drafts_that_cannot_be(arguments: list[object], expected: str, skip_bundle: Path) -> None:
    for command in (["run", skip_bundle, "--ids", "1,2"], ["bench", skip_bundle]):
        assert expected in error_of(dynexport(*command, *arguments))


def test_more_drafts_than_the_context_holds(ids_bundle: Path) -> None:
    ran = dynexport("run", ids_bundle, "--ids", "1,2", "--speculate", 24)
    assert "--speculate: expected a number of drafts, 1..23, found 24" in error_of(ran)


def test_texts_that_are_too_short(skip_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc")
    bench = ["bench", skip_bundle, "--speculate", "--text", text, "--prompt-tokens", 8]
    assert "text: expected at least 8 tokens for the prompts, found 3" in error_of(dynexport(*bench))
    calibrate = ["calibrate", skip_bundle, "--speculate", text, "--window"]
    assert "text: expected at least one window of 8 tokens, found 3" in error_of(dynexport(*calibrate, 8))
    assert "window: expected at most 192 tokens to fit the context" in error_of(dynexport(*calibrate, 200))
    both = dynexport("calibrate", skip_bundle, "--speculate", text, "--text", text)
    assert "expected --text TEXT, or --speculate TEXT, --ngrams TEXT or both without --target-rate" in error_of(both)


def test_a_bundle_that_cannot_be_written_to_is_left_alone(skip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drafting, "write_file", full)
    before = contents(skip_bundle)
    with pytest.raises(DynexportError, match=r"manifest\.json: expected a file to write, found: .*No space left"):
        drafting.store_drafting(Bundle.open(skip_bundle), Drafting(most=2, gain=1.0))
    assert contents(skip_bundle) == before
