"""Draw the imports between rooms, read from the code: `python samples/docs_architecture.py` writes the picture."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise

from house import LEVEL, ROOT, arrows, modules
from svg import Picture

PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# Pixels.
_BOX, _HEIGHT, _ROW, _GAP, _LANE, _EDGE, _HEAD = 204, 74, 128, 26, 22, 26, 66
_LETTERS = 30
_SWEEPS = 24
_TITLE = "Which room of the package imports which"
_LOOKS = {"runtime": "green", "plugins": "violet", "exporter": "blue"}

Graph = Mapping[str, set[str]]


def graph() -> tuple[Graph, set[tuple[str, str]]]:
    """Return the lower rooms that each room imports, and the pairs of rooms that import against the direction."""
    pairs = set(arrows())
    wrong = {(a, b) for a, b in pairs if LEVEL[a] <= LEVEL[b]}
    return {room: {b for a, b in pairs - wrong if a == room} for room in LEVEL}, wrong


def reduced(rooms: Graph) -> Graph:
    """Return the arrows that do not follow from others (the transitive reduction)."""

    @cache
    def below(room: str) -> frozenset[str]:
        return frozenset(rooms[room]).union(*map(below, rooms[room]))

    return {room: {b for b in named if not any(b in below(c) for c in named)} for room, named in rooms.items()}


def words(room: str) -> list[str]:
    """Return the first part of a room's first docstring sentence, in lines that fit a box."""
    package = modules()[f"dynexport.{room}"].tree
    first = re.split(r"[.:;(]\s|[.:;(]?$", (ast.get_docstring(package) or "").replace("`", ""), flags=re.M)[0]
    return textwrap.wrap(first.strip(), _LETTERS)[:3]


class Layout:
    """Positions of rooms by row, and of lanes for arrows that pass a row.

    A room is in the row above the highest room that it imports. Within a row, rooms and lanes are sorted by the mean
    position of their neighbours, which reduces crossings, and moved towards it as far as their widths allow.
    """

    def __init__(self, rooms: Graph) -> None:
        @cache
        def row(room: str) -> int:
            return 1 + max(map(row, rooms[room]), default=-1)

        self.row = {room: row(room) for room in sorted(rooms, key=lambda room: (row(room), LEVEL[room], room))}
        self.lanes: dict[tuple[str, str], list[str]] = {}
        self._links: dict[str, list[str]] = {}
        for room, named in reduced(rooms).items():
            for target in sorted(named):
                self._pass(room, target)
        self._rows = [[node for node in self.row if self.row[node] == i] for i in range(max(self.row.values()) + 1)]
        self.x = {node: float(place) for line in self._rows for place, node in enumerate(line)}
        self._sort()

    def _pass(self, room: str, target: str) -> None:
        lanes = [f"{room}>{target}@{row}" for row in range(self.row[room] - 1, self.row[target], -1)]
        self.row |= {lane: self.row[room] - 1 - number for number, lane in enumerate(lanes)}
        self.lanes[room, target] = lanes
        for upper, lower in zip([room, *lanes], [*lanes, target], strict=True):
            self._links.setdefault(upper, []).append(lower)
            self._links.setdefault(lower, []).append(upper)

    def width(self, node: str) -> int:
        """Return the width of a room's box, or of a lane."""
        return _LANE if "@" in node else _BOX

    def _wanted(self, node: str) -> float:
        links = self._links.get(node, [node])
        return sum(self.x[other] for other in links) / len(links)

    def _sort(self) -> None:
        for sweep in range(_SWEEPS):
            for line in self._rows if sweep % 2 else reversed(self._rows):
                line.sort(key=self._wanted)
                self._spread(line)
        left = min(self.x[node] - self.width(node) / 2 for node in self.x)
        self.x = {node: x - left + _EDGE for node, x in self.x.items()}

    def _spread(self, line: list[str]) -> None:
        """Set the positions nearest to the wanted ones without overlap (isotonic regression by pooling)."""
        offsets = [0.0]
        for left, right in pairwise(line):
            offsets.append(offsets[-1] + (self.width(left) + self.width(right)) / 2 + _GAP)
        pools: list[tuple[float, int]] = []
        for node, offset in zip(line, offsets, strict=True):
            pools.append((self._wanted(node) - offset, 1))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (a, m), (b, n) = pools[-2:]
                pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
        means = [mean for mean, count in pools for _ in range(count)]
        for node, offset, mean in zip(line, offsets, means, strict=True):
            self.x[node] = mean + offset


def picture() -> str:
    """Return the SVG's content."""
    rooms, wrong = graph()
    layout = Layout(rooms)
    width = max(x + layout.width(node) / 2 for node, x in layout.x.items()) + _EDGE
    height = _HEAD + _ROW * (1 + max(layout.row.values())) - (_ROW - _HEIGHT) + _EDGE

    def top(node: str) -> float:
        return height - _EDGE - _HEIGHT - _ROW * layout.row[node]

    p = Picture(width, height, _TITLE)
    p.text(_EDGE, 30, _TITLE, 16, anchor="start", bold=True)
    p.text(_EDGE, 50, "An arrow means “imports”. Those that follow from others are left out.", 12, "soft", "start")
    if wrong:
        p.text(_EDGE, 66, "Dashed: against the direction, to be mended.", 12, "soft", "start")
    ports = _ports(layout)
    for (room, target), lanes in layout.lanes.items():
        points = [(ports[room, target, "out"], top(room) + _HEIGHT)]
        for lane in lanes:
            points += [(layout.x[lane], top(lane)), (layout.x[lane], top(lane) + _HEIGHT)]
        p.arrow(_curve([*points, (ports[room, target, "in"], top(target) - 2)]))
    # Drawn before the boxes, so that names stay readable.
    for a, b in sorted(wrong):
        ends = [(layout.x[room], top(room) + _HEIGHT * (top(room) < top(other))) for room, other in ((a, b), (b, a))]
        p.arrow("M{:.0f} {:.0f} L{:.0f} {:.0f}".format(*ends[0], *ends[1]), "wrong")
    for room in rooms:
        x, y, lines = layout.x[room], top(room), words(room)
        p.rect(x - _BOX / 2, y, _BOX, _HEIGHT, _LOOKS[room.split(".")[0]])
        first = y + _HEIGHT / 2 + 4 - 7 * len(lines)
        p.text(x, first, room.replace(".", "/"), 14, bold=True)
        for number, line in enumerate(lines, start=1):
            p.text(x, first + 2 + 14 * number, line, 11, "soft")
    return p.svg()


def _ports(layout: Layout) -> dict[tuple[str, str, str], float]:
    """Return where each arrow leaves its upper box and enters its lower one, in the order of the other ends."""
    found = {}
    for side, end in (("out", 0), ("in", 1)):
        for room in {pair[end] for pair in layout.lanes}:
            pairs = [pair for pair in layout.lanes if pair[end] == room]

            def beyond(pair: tuple[str, str], end: int = end) -> float:
                lanes = layout.lanes[pair]
                return layout.x[(lanes[-end] if lanes else pair[1 - end])]

            for number, pair in enumerate(sorted(pairs, key=beyond)):
                found[(*pair, side)] = layout.x[room] + (number - (len(pairs) - 1) / 2) * _BOX * 0.8 / len(pairs)
    return found


def _curve(points: Iterable[tuple[float, float]]) -> str:
    (x, y), *rest = points
    parts = [f"M{x:.0f} {y:.0f}"]
    for u, v in rest:
        middle = (y + v) / 2
        straight = abs(u - x) < 1
        parts.append(f"L{u:.0f} {v:.0f}" if straight else f"C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}")
        x, y = u, v
    return " ".join(parts)


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
