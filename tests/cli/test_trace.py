"""``dynexport run --trace`` as a user types it, and what ``run`` says of routed layers without it."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE, dynexport, error_of, talking_checkpoint

from dynexport.exporter.bundle.conversion import convert

SIZES = ["--max-new-tokens", 16, "--threads", 1]
# Where the answer's best two tokens are nearer than this, rounding may choose either.
NEAR_TIE = 2e-3
ROUTE_MARGIN = 1e-5
# Letters that the smallest vocabulary has, of 61 tokens.
PROMPT = 'IS 2 <B> "3"?'


@dataclass(frozen=True)
class Case:
    """A converted checkpoint of the conformance set, and an independent implementation's answers."""

    name: str
    bundle: Path
    expected: dict[str, Any]


CASES = ["dense", "skip-2x", "mod-router", "mod-overflow", "mod-topk", "mod-predictor-normed", "loop-exit-last"]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    home = tmp_path_factory.mktemp(request.param)
    convert(talking_checkpoint(home / "model", request.param), home / "bundle", golden=False)
    return Case(request.param, home / "bundle", json.loads((CONFORMANCE / request.param / "expected.json").read_text()))


@pytest.fixture(scope="module")
def mod_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixture-of-Depths: 4 layers, 1 and 3 routed; a tokenizer of single characters."""
    home = tmp_path_factory.mktemp("mod")
    convert(talking_checkpoint(home / "model", "mod-router"), home / "bundle", golden=False)
    return home / "bundle"


class Titles(HTMLParser):
    """What hovering over the cells of a page tells."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag == "td" and (title := dict(attrs).get("title")):
            self.found.append(title)


def test_three_formats_at_once(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = {suffix: tmp_path / f"trace.{suffix}" for suffix in ("png", "html", "json")}
    options = [word for path in paths.values() for word in ("--trace", path)]
    ran = dynexport("run", case.bundle, "--prompt", PROMPT, *SIZES, *options)
    assert (ran.code, ran.err) == (0, "")
    for path in paths.values():
        assert f"trace: {path}\n" in ran.out
    trace = json.loads(paths["json"].read_text())
    texts = [token["text"] for token in trace["tokens"]]
    assert "".join(texts[:13]) == PROMPT and len(texts) == 13 + 15
    assert ran.out.startswith("".join(text for text in texts[13:] if not text.startswith("<|im_")))
    assert [token["is_prompt"] for token in trace["tokens"]] == [True] * 13 + [False] * 15
    titles = Titles(paths["html"]).found
    assert len(titles) == trace["layers"] * 28
    assert titles[5].startswith(f"“<”, token 5; layer {trace['layers'] - 1}: ")
    header = paths["png"].read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header.startswith(b"\x89PNG") and 1000 < width < 2500 and 450 < height < 1500


def test_the_json_agrees_with_another_implementation(case: Case, tmp_path: Path) -> None:
    for number, run in enumerate(case.expected["runs"]):
        path = tmp_path / f"{number}.json"
        ids = ",".join(map(str, run["prompt"]))
        ran = dynexport("run", case.bundle, "--ids", ids, *SIZES, "--trace", path, "--json", "-")
        trace, prompt = json.loads(path.read_text()), len(run["prompt"])
        assert [token["id"] for token in trace["tokens"]] == run["prompt"] + ran.report["ids"][:-1]
        near = [i for i, margin in enumerate(run["logit_margins"]) if margin < NEAR_TIE]
        if near:
            assert ran.report["ids"][: near[0]] == run["greedy"][: near[0]]
        else:
            assert ran.report["ids"] == run["greedy"]
            check_sums(trace, run, ran.report)
        certain = prompt + (near[0] if near else len(run["greedy"]) - 1)
        check_routes(case, trace, run, certain)


def check_routes(case: Case, trace: dict[str, Any], run: dict[str, Any], certain: int) -> None:
    routed = [layer["layer"] for layer in trace["routed"]]
    told = tells_every_layer(trace, run)
    for layer in range(trace["layers"]):
        ran = trace["ran"][layer][:certain]
        if told:
            assert ran == [route[layer] for route in run["routes"][:certain]]
            assert run["smallest_route_margin"] > ROUTE_MARGIN
        elif layer in routed:
            row = routed.index(layer)
            answer = [bool(route[row]) for route in run["routes"][:certain]]
            decided = zip(ran, answer, trace["margins"][row][:certain], strict=True)
            assert all(a == b or margin < ROUTE_MARGIN for a, b, margin in decided)
        else:
            kept = case.expected["keep"] is None or layer in case.expected["keep"]
            assert ran == [place < len(run["prompt"]) or kept for place in range(certain)]
    assert trace["depth"] == [sum(column) for column in zip(*trace["ran"], strict=True)]


def tells_every_layer(trace: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether an answer's routes are about every layer, as a loop's are: one of its decisions is about several."""
    return bool(run["routes"]) and len(run["routes"][0]) == trace["layers"]


def check_sums(trace: dict[str, Any], run: dict[str, Any], report: dict[str, Any]) -> None:
    """What was counted without a record is what the record says."""
    assert "depth" in report if trace["routed"] else "depth" not in report
    if not trace["routed"]:
        return
    routes = run["routes"]
    assert sum(layer["overflow"] for layer in trace["routed"]) == run["overflow"]
    rates = [sum(column) / len(routes) for column in zip(*routes, strict=True)]
    if tells_every_layer(trace, run):
        rates = [rates[layer["layer"]] for layer in trace["routed"]]
    assert [layer["rate"] for layer in trace["routed"]] == pytest.approx(rates)
    assert report["depth"]["routed"] == trace["routed"]
    assert report["depth"]["tokens"] == len(trace["tokens"])
    assert report["depth"]["layers_per_token"] == pytest.approx(sum(trace["depth"]) / len(trace["depth"]))


def test_a_line_and_the_report_say_how_deep_routed_tokens_went(mod_bundle: Path) -> None:
    arguments = ["run", mod_bundle, "--prompt", "Hello", *SIZES]
    depth = dynexport(*arguments, "--json", "-").report["depth"]
    rate = sum(layer["rate"] for layer in depth["routed"]) / 2
    assert (depth["tokens"], depth["layers"], [layer["layer"] for layer in depth["routed"]]) == (20, 4, [1, 3])
    assert depth["layers_per_token"] == pytest.approx(2 + 2 * rate)
    assert dynexport(*arguments).out.splitlines()[-1] == (
        f"routed layers ran {100 * rate:.0f} % of tokens; {2 + 2 * rate:.1f} of 4 layers per token; overflow 0"
    )


def test_a_margin_that_is_infinite_is_null(tmp_path: Path) -> None:
    convert(CONFORMANCE / "mod-topk", tmp_path / "bundle", golden=False)
    arguments = ["--ids", 5, "--max-new-tokens", 2, "--trace", tmp_path / "t.json", "--trace", tmp_path / "t.html"]
    assert dynexport("run", tmp_path / "bundle", *arguments).code == 0
    trace = json.loads((tmp_path / "t.json").read_text())
    # The only token of a prompt has no other to be compared with.
    assert [row[0] for row in trace["margins"]] == [None, None]
    assert all(row[1] is not None for row in trace["margins"])
    assert Titles(tmp_path / "t.html").found[0].endswith("margin none")


def test_a_bundle_of_several_graphs_and_no_tokenizer(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "bundle", static=True, golden=False)
    arguments = ["--ids", "1,2,3", *SIZES, "--trace", tmp_path / "t.json"]
    assert dynexport("run", tmp_path / "bundle", *arguments).code == 0
    trace = json.loads((tmp_path / "t.json").read_text())
    assert trace["depth"] == [8] * 3 + [4] * 15 and trace["speedup"] == "2"
    assert {token["text"] for token in trace["tokens"]} == {None}


def test_one_token_and_nothing_fed_back(mod_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = [word for suffix in ("png", "html", "json") for word in ("--trace", tmp_path / f"t.{suffix}")]
    ran = dynexport("run", mod_bundle, "--ids", 1, "--max-new-tokens", 1, *options)
    assert (ran.code, ran.err) == (0, "")
    assert len(json.loads((tmp_path / "t.json").read_text())["tokens"]) == 1


def test_chat_with_one_message(mod_bundle: Path, tmp_path: Path) -> None:
    ran = dynexport("run", mod_bundle, "--chat", "--prompt", "Hi", *SIZES, "--trace", tmp_path / "t.json")
    assert ran.code == 0, ran.err
    texts = [token["text"] for token in json.loads((tmp_path / "t.json").read_text())["tokens"] if token["is_prompt"]]
    assert "".join(texts) == "<|im_start|>user:Hi<|im_end|><|im_start|>assistant:"
    assert texts[0] == "<|im_start|>"


BAD: dict[str, tuple[str, str]] = {
    "another suffix": ("trace.svg", "trace.svg: expected a name in .png, .html or .json, found '.svg'"),
    "no suffix": ("trace", "trace: expected a name in .png, .html or .json, found 'none'"),
    "no such directory": ("nowhere/t.json", "nowhere/t.json: expected a file to write, found No such file"),
    "a directory": ("there.json", "there.json: expected a file to write, found a directory"),
    "no place for files": ("/proc/t.html", "/proc/t.html: expected a file to write, found "),
    "a device": ("device.json", "device.json: expected a file to write, found something else"),
}


@pytest.mark.parametrize(("path", "expected"), BAD.values(), ids=BAD)
def test_a_bad_place_is_told_before_the_work(
    path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path)
    # There is no bundle either, which nobody gets to see.
    assert expected in error_of(dynexport("run", "bundle", "--ids", 1, "--trace", "good.json", "--trace", path))
    assert not (tmp_path / "good.json").exists()


def test_a_conversation_leaves_no_trace(mod_bundle: Path, tmp_path: Path) -> None:
    ran = dynexport("run", mod_bundle, "--chat", "--trace", tmp_path / "t.json", stdin="Hello\n")
    assert "--trace: expected --prompt or --ids beside it, found a conversation" in error_of(ran)


def test_without_matplotlib_only_pictures_fail(
    mod_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["run", mod_bundle, "--ids", 1, *SIZES, "--trace"]
    message = error_of(dynexport(*arguments, tmp_path / "t.png"))
    assert "matplotlib is needed to draw a trace as PNG" in message
    assert "pip install 'dynexport[pictures]'" in message
    assert dynexport(*arguments, tmp_path / "t.html", "--trace", tmp_path / "t.json").code == 0


def test_a_long_sequence(mod_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ids = ",".join(str(i % 80) for i in range(200))
    options = [word for suffix in ("png", "html", "json") for word in ("--trace", tmp_path / f"t.{suffix}")]
    ran = dynexport("run", mod_bundle, "--ids", ids, "--max-new-tokens", 100, *options)
    assert (ran.code, ran.err) == (0, "")
    assert len(json.loads((tmp_path / "t.json").read_text())["tokens"]) == 256
    assert len(Titles(tmp_path / "t.html").found) == 4 * 256
    (width,) = struct.unpack(">I", (tmp_path / "t.png").read_bytes()[16:20])
    assert 3500 < width < 4500
