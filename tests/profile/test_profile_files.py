"""The pictures and the directory that they go to."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from figures import Drawn, check_texts

from dynexport.exporter.profile import Measured, ProfileDirectory, pictures, summarise
from dynexport.exporter.trace import Token
from dynexport.exporter.trace.page import looks
from dynexport.runtime.bundle.errors import DynexportError

pytest.importorskip("matplotlib")
MakeMeasured = Callable[..., Measured]


def tokens(count: int, words: tuple[str | None, ...] = (" word",)) -> tuple[Token, ...]:
    return tuple(Token(id=i, text=words[i % len(words)], is_prompt=True) for i in range(count))


def size(content: bytes) -> tuple[int, int]:
    """Width and height, as the header says."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_texts_are_texts(make_measured: MakeMeasured) -> None:
    words = ("$x^", "\\frac{", "<b>", "\u202eabc", "日本", "\x00", "", "a" * 60, "\n", "%", None, "\U000e0100")
    measured = make_measured()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that no font has would be one
        with looks(["DejaVu Sans"]):
            pictures._heatmap(measured, tokens(40, words), "a $ model_{")


def test_contributions_of_zero_can_be_drawn(make_measured: MakeMeasured) -> None:
    measured = make_measured()
    for values in (measured.influence, *(r for block in measured.blocks.values() for r in vars(block).values())):
        values[:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.render(summarise(measured), measured, tokens(40), "model")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second, and the command's test draws them."""
    monkeypatch.setattr(pictures, "render", lambda *_: dict.fromkeys(pictures.NAMES, b"PNG"))


@pytest.mark.usefixtures("no_pictures")
def test_files_are_replaced_and_others_left_alone(tmp_path: Path, make_measured: MakeMeasured) -> None:
    measured = make_measured()
    directory = ProfileDirectory(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "mine.txt").write_text("mine")
    (tmp_path / "a" / "b" / "profile.json").write_text("an earlier one, and longer than that")
    written = directory.write(summarise(measured), measured, tokens(40), {"tokens": 40}, "model")
    assert json.loads((tmp_path / "a" / "b" / "profile.json").read_text()) == {"tokens": 40}
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == sorted([*(path.name for path in written), "mine.txt"])


@pytest.mark.usefixtures("no_pictures")
def test_places_that_cannot_be_written(tmp_path: Path, make_measured: MakeMeasured) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "medians.png").mkdir(parents=True)
    for path, expected in {
        tmp_path / "file": "Not a directory",
        tmp_path / "file" / "below": "Not a directory",
        tmp_path / "taken": "a directory in the place of medians.png",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "a\0b": "null",
    }.items():
        with pytest.raises(DynexportError, match=f"expected a directory to write, found .*{expected}"):
            ProfileDirectory(path)
    measured = make_measured()
    directory = ProfileDirectory(tmp_path / "late")
    (tmp_path / "late").write_text("")
    with pytest.raises(DynexportError, match="expected a directory to write, found File exists"):
        directory.write(summarise(measured), measured, tokens(40), {}, "model")


def test_without_matplotlib_the_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(DynexportError, match=r"matplotlib is needed to draw a profile .* 'dynexport\[pictures\]'"):
        ProfileDirectory(tmp_path / "d")


@pytest.mark.parametrize(
    ("layers", "count", "window", "blocks"),
    [(1, 1, 1, ["attention + mlp"]), (100, 256, 100, ["attention", "mlp"])],
    ids=["one token", "100 layers"],
)
def test_labels_are_whole_and_lie_beside_each_other(
    make_measured: MakeMeasured,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    count: int,
    window: int,
    blocks: list[str],
) -> None:
    measured, drawn = make_measured(layers, count, window, blocks), Drawn(monkeypatch)
    words = (" incomprehensibilities", "x", "WWWWWWWWWWWWWWWW", "$x^2$", None)
    made = pictures.render(summarise(measured), measured, tokens(count, words), "a/very-long-name-of-a-model" * 5)
    assert tuple(made) == pictures.NAMES
    for content in made.values():
        width, height = size(content)
        assert 900 < width < 3000 and 250 < height < 3000
    assert len(drawn.figures) == len(made)
    for figure in drawn.figures:
        check_texts(figure)
