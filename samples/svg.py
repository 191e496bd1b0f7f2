"""Draw SVGs for light and dark pages: a shape names its look, and a look has one colour for each."""

from __future__ import annotations

from html import escape

# Look -> its colour in light pages and in dark pages.
TEXT = {
    "ink": ("#1f2933", "#eef2f6"),
    "soft": ("#52606d", "#b3bfcb"),
    "blue-ink": ("#1f5fbf", "#9dc1f7"),
    "green-ink": ("#1f7346", "#7dd3a5"),
    "amber-ink": ("#8a5a00", "#f0c267"),
}
PAGE = ("#ffffff", "#12181f")
# Look -> (fill, edge), each for light and for dark pages.
FILLS = {
    "blue": (("#e3edfd", "#1a3154"), ("#3b73c9", "#7fa9e8")),
    "green": (("#e0f4e8", "#16392a"), ("#2f8f5b", "#58b583")),
    "violet": (("#efe7fb", "#33264d"), ("#8059c2", "#b195e0")),
    "amber": (("#fbdfa6", "#6b4a10"), ("#a8700c", "#e0b050")),
    "strong-blue": (("#8fb4ee", "#3f6fb8"), ("#2b5ca8", "#9dc1f7")),
    "strong-green": (("#4f9f74", "#7cc79d"), ("#1f7346", "#b9e8cd")),
    "empty": (("#ffffff", "#12181f"), ("#c5cdd5", "#4a5763")),
}
LINES = {"arrow": ("#52606d", "#b3bfcb"), "wrong": ("#b42318", "#ff9a8d")}


def _style() -> str:
    def looks(theme: int) -> str:
        return "\n".join(
            [
                f".page {{ fill: {PAGE[theme]}; }}",
                *(f".{name} {{ fill: {colour[theme]}; }}" for name, colour in TEXT.items()),
                *(f".{name} {{ fill: {a[theme]}; stroke: {b[theme]}; }}" for name, (a, b) in FILLS.items()),
                *(f".{name} {{ stroke: {colour[theme]}; }}" for name, colour in LINES.items()),
                *(f".{name}-tip {{ fill: {colour[theme]}; }}" for name, colour in LINES.items()),
            ]
        )

    common = (
        'svg { font-family: Helvetica, Arial, "DejaVu Sans", sans-serif; }\n'
        "path { fill: none; stroke-width: 1.5; } .wrong { stroke-dasharray: 6 4; }"
    )
    return f"{common}\n{looks(0)}\n@media (prefers-color-scheme: dark) {{\n{looks(1)}\n}}"


class Picture:
    """An SVG that is drawn shape by shape; coordinates are pixels, ``look`` is a name in the tables above."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_style()}\n</style>",
            f"<defs>{''.join(map(self._tip, LINES))}</defs>",
        ]
        self.rect(0, 0, width, height, "page", radius=10)

    @staticmethod
    def _tip(line: str) -> str:
        size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse"'
        shape = f'<polygon points="0,0.5 8,4 0,7.5" class="{line}-tip"/>'
        return f'<marker id="{line}" {size} orient="auto">{shape}</marker>'

    def rect(self, x: float, y: float, w: float, h: float, look: str, radius: float = 6) -> None:
        """Draw a rounded rectangle."""
        self._parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="{radius:g}" class="{look}"/>'
        )

    def text(
        self, x: float, y: float, words: str, size: int = 13, look: str = "ink", anchor: str = "middle",
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Draw one line of text; ``y`` is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" class="{look}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def arrow(self, path: str, look: str = "arrow") -> None:
        """Draw a line along a path, with a tip at its end."""
        self._parts.append(f'<path d="{path}" class="{look}" marker-end="url(#{look})"/>')

    def svg(self) -> str:
        """Return the file's content."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"
