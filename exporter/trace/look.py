"""What a trace shows in every format: each cell's place in the palette, tokens as labels, and facts in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.exporter.trace.colours import RAN, ROUTED_RAN, ROUTED_SKIPPED, SHADES, SKIPPED
from dynexport.exporter.trace.model import RoutedLayer, Token, Trace
from dynexport.runtime.bundle.manifest import FULL

Array = np.ndarray


def cells(trace: Trace) -> Array:
    """int64 [layers, tokens], places in a palette; where a router decided, shaded by its score.

    The tokens of a layer that ran are compared with each other, and so are those that did not: a score means nothing
    beside another layer's, and one that is far from all others would leave no shades for these. On a path the shade is
    the step, the last one where a token came back.
    """
    ran = np.array(trace.ran, bool)
    places = np.where(ran, RAN, SKIPPED)
    longest = max(map(len, trace.paths), default=0)
    for token, path in enumerate(trace.paths):
        for step, taken in enumerate(path):
            places[taken, token] = ROUTED_RAN.start + step * SHADES // longest
    for layer, scores in zip(trace.routed, trace.scores, strict=True):
        for decision, shades in ((True, ROUTED_RAN), (False, ROUTED_SKIPPED)):
            group = ran[layer.layer] == decision
            places[layer.layer, group] = shades.start + _shade(np.array(scores, float)[group])
    return places


def steps(trace: Trace) -> dict[tuple[int, int], str]:
    """(layer, token) -> the steps of its path, counted from 1, in which the token took the layer: "2", "1-3", "1·4"."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    for token, path in enumerate(trace.paths):
        for step, layer in enumerate(path, start=1):
            runs = found.setdefault((layer, token), [])
            if runs and runs[-1][1] == step - 1:
                runs[-1][1] = step
            else:
                runs.append([step, step])
    return {
        cell: "·".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
        for cell, runs in found.items()
    }


def _shade(scores: Array) -> Array:
    """int64, 0 for the lowest of these scores up to the last shade for the highest, by rank; 0 without a score."""
    known = np.isfinite(scores)
    ranks = np.searchsorted(np.sort(scores[known]), scores, side="right") / max(1, known.sum())
    return np.where(known, np.ceil(ranks * SHADES) - 1, 0).astype(np.int64)


def visible(text: str) -> str:
    """The text with signs for what cannot be seen, in one line."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def label(token: Token, longest: int = 14) -> str:
    """A token in a few characters; its id where it has no text of its own."""
    if token.text is None:
        return str(token.id)
    words = visible(token.text.strip(" ")) or "␣" * len(token.text)
    return words if 0 < len(words) <= longest else f"{words[: longest - 1]}…" if words else f"#{token.id}"


def readable(token: Token) -> str:
    """A token's own text, line breaks kept; its id where it has none."""
    if token.text is None:
        return str(token.id)
    return "\n".join(visible(line) for line in token.text.split("\n")).replace("\n", "↵\n")


def headline(trace: Trace) -> str:
    """Strategy, ratio and how deep tokens went."""
    ratio = f" at ratio {trace.speedup}" if trace.speedup != FULL else ""
    if trace.paths:
        return (
            f"{trace.strategy}: paths of {trace.layers_per_token:.1f} layers per token through a pool of {trace.layers}"
        )
    return f"{trace.strategy}{ratio}: {deep(trace.layers_per_token, trace.layers)}"


def facts(trace: Trace) -> str:
    """Numbers of tokens, and what routed layers came to."""
    generated = len(trace.tokens) - trace.prompt_tokens
    words = f"tokens: {trace.prompt_tokens} of the prompt, {generated} generated and fed back"
    return "; ".join([words, *(routed(trace.routed) if trace.routed else ())])


def deep(layers_per_token: float, layers: int) -> str:
    """A mean depth in words."""
    return f"{layers_per_token:.1f} of {layers} layers per token"


def routed(layers: Sequence[RoutedLayer]) -> tuple[str, str]:
    """The mean share of tokens that ran in routed layers, and the overflow of all, in words."""
    rate = sum(layer.rate for layer in layers) / len(layers)
    return f"routed layers ran {100 * rate:.0f} % of tokens", f"overflow {sum(layer.overflow for layer in layers)}"


def depths(trace: Trace) -> dict[str, list[int]]:
    """Layers run, of the tokens of the prompt and of those generated."""
    told = list(zip(trace.depth, trace.tokens, strict=True))
    return {
        "prompt": [depth for depth, token in told if token.is_prompt],
        "generated": [depth for depth, token in told if not token.is_prompt],
    }


def meanings(trace: Trace) -> list[tuple[list[int], str]]:
    """Places in a palette and what they mean, of those that the trace has."""
    if trace.paths:
        return [
            (list(ROUTED_RAN), "ran, from its first step to its last"),
            ([], "numbers: its steps"),
            ([SKIPPED], "did not run"),
        ]
    choosing = {layer.layer for layer in trace.routed}
    shaded = [
        (list(ROUTED_RAN), "routed layer: ran, from low to high scores"),
        (list(ROUTED_SKIPPED), "routed layer: did not run, likewise"),
    ]
    others = {place for layer, row in enumerate(trace.ran) if layer not in choosing for place in row}
    where = "other layer: " if choosing else ""
    plain = [([RAN], f"{where}ran", True), ([SKIPPED], f"{where}did not run", False)]
    return [*(shaded if choosing else []), *((places, words) for places, words, ran in plain if ran in others)]


def overflow(layer: RoutedLayer) -> str:
    """To be put behind a layer's share."""
    return f", overflow {layer.overflow}" if layer.overflow else ""
