"""PNGs: their sizes, whatever is drawn; that no text is a formula; and what is drawn where."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from figures import Drawn, check_texts

from dynexport.exporter.trace import Trace, png
from dynexport.exporter.trace.colours import LIGHT, RAN, ROUTED_RAN, SKIPPED

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.image import imread  # noqa: E402

MakeTrace = Callable[..., Trace]


def size(content: bytes) -> tuple[int, int]:
    """Width and height, as the header says."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def colours(content: bytes) -> set[str]:
    """Every colour in the picture."""
    pixels = (imread(io.BytesIO(content))[..., :3] * 255).round().astype(int)
    found = np.unique(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2])
    return {f"#{value:06x}" for value in found}


def test_a_long_sequence_stays_within_bounds_and_names_fewer_tokens(make_trace: MakeTrace) -> None:
    trace = make_trace(12, range(1, 12, 2), 500, 3500)
    width, height = size(png.render(trace))
    assert 3500 < width < 4500 and height < 2000
    named = png._labels(trace, 24, ["DejaVu Sans"])
    assert list(named)[:3] == [0, 24, 48] and named[24] == "word 24"


def test_every_colour_that_is_explained_is_there(make_trace: MakeTrace) -> None:
    there = colours(png.render(make_trace(4, [1, 3], 20, 60)))
    assert set(LIGHT.palette[1:]) <= there
    assert {LIGHT.prompt, LIGHT.generated} <= there


def test_texts_are_texts(make_trace: MakeTrace) -> None:
    words = ["$x^", "\\frac{", "<b>", "\u202eabc", "日本", "\x00", "", "a" * 60, "\n", "%", "{}", "_", None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character that no font has would be one
        size(png.render(make_trace(4, [1], 6, 7, words)))


def test_a_character_that_no_font_has_leaves_the_id(make_trace: MakeTrace) -> None:
    trace = make_trace(1, [], 2, 0, ["\U000e0100x\u4e2d", "ok"])
    assert png._labels(trace, 1, ["DejaVu Sans"]) == {0: "#0", 1: "ok"}


def test_what_a_user_set_for_other_pictures_does_not_matter(make_trace: MakeTrace) -> None:
    trace = make_trace(2, [1], 2, 2)
    plain = png.render(trace)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "text.usetex": True, "savefig.dpi": 20}):
        assert png.render(trace) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_a_path_is_drawn(path_trace: Trace) -> None:
    drawn, plain = png.render(path_trace), png.render(path_trace.model_copy(update={"paths": ()}))
    assert LIGHT.palette[ROUTED_RAN.start] in colours(drawn) - colours(plain)


LONG = [" incomprehensibilities", "x", "WWWWWWWWWWWWWWWW", "$x^2$", None]


@pytest.mark.parametrize(
    ("layers", "routed", "prompt", "new"),
    [(1, [0], 1, 0), (4, [], 1, 1), (8, range(8), 1, 40), (100, range(1, 100, 2), 30, 31), (6, [1, 3], 700, 1300)],
    ids=["one token", "two tokens", "every layer routed", "100 layers", "2,000 tokens"],
)
def test_labels_are_whole_and_lie_beside_each_other(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch, layers: int, routed: Sequence[int], prompt: int, new: int
) -> None:
    trace = make_trace(layers, routed, prompt, new, LONG)
    full = tuple(layer.model_copy(update={"rate": 1.0, "overflow": prompt + new}) for layer in trace.routed)
    drawn = Drawn(monkeypatch)
    width, height = size(png.render(trace.model_copy(update={"routed": full, "speedup": "2.5"})))
    assert 1000 < width < 4500 and 450 < height < 2600
    check_texts(drawn.figures[0])


def test_cells_of_tokens_that_did_not_run_are_smaller(make_trace: MakeTrace) -> None:
    """Seen without any colour: around them is the page."""
    trace = make_trace(1, [], 1, 9).model_copy(update={"ran": ((True,) + (False,) * 9,)})
    pixels = (imread(io.BytesIO(png.render(trace)))[..., :3] * 255).round().astype(int)
    skipped, ran = ([int(LIGHT.palette[place][i : i + 2], 16) for i in (1, 3, 5)] for place in (SKIPPED, RAN))
    ratio = (pixels == skipped).all(-1).sum() / (pixels == ran).all(-1).sum()
    assert 9 * 0.2 < ratio < 9 * 0.6
