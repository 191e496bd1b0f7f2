"""Colours by numbers: text is read (WCAG 2.2), and what differs, differs in grey and to eyes that see fewer colours."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
import svg

from dynexport.exporter.trace.colours import (
    DARK,
    LIGHT,
    RAN,
    ROUTED_RAN,
    ROUTED_SKIPPED,
    SERIES,
    SKIPPED,
    Theme,
    contrast,
    legible,
    luminance,
    ran,
)

# Linear sRGB as such eyes see it (Machado, Oliveira, Fernandes 2009, severity 1).
EYES = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
themes = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def lightness(colour: str, eyes: str = "all colours") -> float:
    """CIE L* of #rrggbb, 0 to 100: what is left of it in a grey print."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    y = float(np.clip(np.array(EYES[eyes]) @ linear, 0, 1) @ [0.2126, 0.7152, 0.0722])
    return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert luminance("#ff0000") == pytest.approx(0.2126)


@themes
def test_text_is_read(theme: Theme) -> None:
    for text in (theme.ink, theme.soft, theme.generated, theme.accent):
        assert contrast(text, theme.page) >= 4.5, text
    for background in theme.depths:
        assert contrast(theme.ink, background) >= 4.5, background
    for background in theme.palette:
        assert contrast(legible(background), background) >= 4.5, background


@themes
@pytest.mark.parametrize("eyes", EYES)
def test_what_ran_is_told_from_what_did_not_by_lightness(theme: Theme, eyes: str) -> None:
    """From the page on: a layer that was left out, a router's no, a layer that ran, a router's yes."""
    places = [[SKIPPED], list(ROUTED_SKIPPED), [RAN], list(ROUTED_RAN)]
    assert sorted(chain(*places)) == list(range(len(theme.palette)))
    assert [place for place in range(len(theme.palette)) if ran(place)] == [RAN, *ROUTED_RAN]
    away = 1 if theme is DARK else -1
    groups = [[away * lightness(theme.palette[place], eyes) for place in group] for group in places]
    for near, far in pairwise(groups):
        assert min(far) - max(near) > (3 if near is groups[0] else 8)


@themes
def test_scales_are_ordered_by_lightness(theme: Theme) -> None:
    away = 1 if theme is DARK else -1
    scales = theme.depths, [theme.palette[i] for i in ROUTED_SKIPPED], [theme.palette[i] for i in ROUTED_RAN]
    for scale in scales:
        assert all(away * (lightness(b) - lightness(a)) > 2 for a, b in pairwise(scale))


@themes
def test_prompt_and_generated_are_told_apart(theme: Theme) -> None:
    assert abs(lightness(theme.prompt) - lightness(theme.generated)) > 25


@pytest.mark.parametrize("eyes", EYES)
def test_lines_are_told_apart(eyes: str) -> None:
    assert all(contrast(colour, LIGHT.page) >= 3 for colour in SERIES)
    shades = sorted(lightness(colour, eyes) for colour in SERIES)
    assert all(b - a > 10 for a, b in pairwise(shades))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_pictures_of_the_documentation_are_read(theme: int) -> None:
    page = svg.PAGE[theme]
    for name, colours in svg.TEXT.items():
        assert contrast(colours[theme], page) >= 4.5, name
    for name in ("green", "violet", "blue"):
        fill, edge = svg.FILLS[name]
        assert contrast(svg.TEXT["ink"][theme], fill[theme]) >= 4.5, name
        assert contrast(svg.TEXT["soft"][theme], fill[theme]) >= 4.5, name
        assert contrast(edge[theme], page) >= 3, name
    kinds = [lightness(svg.FILLS[name][0][theme]) for name in ("strong-blue", "strong-green", "empty")]
    assert all(abs(a - b) > 10 for i, a in enumerate(kinds) for b in kinds[:i])
