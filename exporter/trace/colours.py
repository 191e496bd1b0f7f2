"""The colours of pictures for light and dark pages; their lightness alone distinguishes them.

Scales are parts of cividis (Nunez, Anderton, Renslow 2018), which looks nearly the same with red-green colour
blindness. Larger values are darker on a light page and lighter on a dark page. ``tests/trace/test_colours.py`` checks
the distances.
"""

from __future__ import annotations

from dataclasses import dataclass

# Number of shades in a scale.
SHADES = 6
# Indices of a palette: two for layers without a router, then the shades of routed layers by score.
SKIPPED, RAN = 0, 1
ROUTED_SKIPPED = range(2, 2 + SHADES)
ROUTED_RAN = range(2 + SHADES, 2 + 2 * SHADES)


@dataclass(frozen=True)
class Theme:
    """The colours of one kind of page, each as #rrggbb.

    Attributes:
        page: the background.
        ink: main text.
        soft: secondary text.
        line: axes.
        frame: the grid behind a drawing.
        prompt: prompt tokens.
        generated: generated tokens.
        accent: names of routed layers.
        depths: backgrounds of a token's text, from the smallest depth to the largest.
        palette: colours of cells, by the indices above.
    """

    page: str
    ink: str
    soft: str
    line: str
    frame: str
    prompt: str
    generated: str
    accent: str
    depths: tuple[str, ...]
    palette: tuple[str, ...]


LIGHT = Theme(
    page="#ffffff",
    ink="#1f2933",
    soft="#52606d",
    line="#9aa5b1",
    frame="#e1e5ea",
    prompt="#b3bcc6",
    generated="#2f68a5",
    accent="#0d4c86",
    depths=("#f3f7fc", "#dbe8f6", "#c3d9f0", "#aacaea", "#92bce4", "#7aaede"),
    palette=(
        *("#eaeef2", "#8390a0"),
        *("#f9e03a", "#ebd44b", "#dec958", "#d1bf61", "#c5b568", "#b9ab6d"),
        *("#666970", "#545a6d", "#404c6c", "#273e6e", "#003070", "#00224e"),
    ),
)
DARK = Theme(
    page="#12181f",
    ink="#eef2f6",
    soft="#b3bfcb",
    line="#5c6977",
    frame="#2a333d",
    prompt="#5f6b78",
    generated="#8ab8ec",
    accent="#9dc1f7",
    depths=("#1b242f", "#1f2e41", "#233953", "#284364", "#2c4e76", "#305888"),
    palette=(
        *("#232b35", "#7a8594"),
        *("#163770", "#2b406d", "#3a486c", "#46516c", "#52596d", "#5e626e"),
        *("#aea371", "#beaf6b", "#cebc63", "#dfca57", "#f0d846", "#fee838"),
    ),
)
# Colours of lines on light pages. They differ in lightness; markers and dashes differ too.
SERIES = ("#0d4c86", "#b9770e", "#1f2933")


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb by WCAG 2.2, 0 to 1."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio by WCAG 2.2, 1 to 21; text needs 4.5, graphics need 3."""
    lower, higher = sorted((luminance(first), luminance(second)))
    return (higher + 0.05) / (lower + 0.05)


def legible(background: str) -> str:
    """Return black or white, the one with more contrast to the background: at least 4.5."""
    return max(("#000000", "#ffffff"), key=lambda colour: contrast(colour, background))


def ran(place: int) -> bool:
    """Return whether an index of a palette means that the token ran."""
    return place == RAN or place in ROUTED_RAN
