"""The parts of a trace that all formats share: palette index of each cell, token labels, and facts in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.exporter.trace.colours import RAN, ROUTED_RAN, ROUTED_SKIPPED, SHADES, SKIPPED
from dynexport.exporter.trace.model import RoutedLayer, Token, Trace
from dynexport.runtime.bundle.manifest import FULL

Array = np.ndarray


def cells(trace: Trace) -> Array:
    """Return the palette index of each cell, int64 [layers, tokens]; routed cells are shaded by score.

    A shade is the rank of the score among the tokens of the same layer that ran, or among those that did not. Scores
    of different layers are not comparable, and with ranks an outlier does not use up the shades. On a path the shade
    is the hop; for a layer that a token took several times, the last hop.
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
    """Return (layer, token) -> the hops, counted from 1, in which the token took the layer: "2", "1-3", "1·4"."""
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
    """Return int64 shades by rank, from 0 for the lowest score to SHADES - 1 for the highest; 0 without a score."""
    known = np.isfinite(scores)
    ranks = np.searchsorted(np.sort(scores[known]), scores, side="right") / max(1, known.sum())
    return np.where(known, np.ceil(ranks * SHADES) - 1, 0).astype(np.int64)


def visible(text: str) -> str:
    """Return the text in one line, with signs for invisible characters."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def label(token: Token, longest: int = 14) -> str:
    """Return a token's text, cut to ``longest`` characters; its id if it has no text."""
    if token.text is None:
        return str(token.id)
    words = visible(token.text.strip(" ")) or "␣" * len(token.text)
    return words if 0 < len(words) <= longest else f"{words[: longest - 1]}…" if words else f"#{token.id}"


def readable(token: Token) -> str:
    """Return a token's text with its line breaks; its id if it has no text."""
    if token.text is None:
        return str(token.id)
    return "\n".join(visible(line) for line in token.text.split("\n")).replace("\n", "↵\n")


def headline(trace: Trace) -> str:
    """Return the strategy, the ratio and the mean depth, in words."""
    ratio = f" at ratio {trace.speedup}" if trace.speedup != FULL else ""
    if trace.paths:
        return (
            f"{trace.strategy}: paths of {trace.layers_per_token:.1f} layers per token through a pool of {trace.layers}"
        )
    return f"{trace.strategy}{ratio}: {deep(trace.layers_per_token, trace.layers)}"


def facts(trace: Trace) -> str:
    """Return the numbers of tokens and the figures of routed layers, in words."""
    generated = len(trace.tokens) - trace.prompt_tokens
    words = f"tokens: {trace.prompt_tokens} of the prompt, {generated} generated and fed back"
    return "; ".join([words, *(routed(trace.routed) if trace.routed else ())])


def deep(layers_per_token: float, layers: int) -> str:
    """Return a mean depth in words."""
    return f"{layers_per_token:.1f} of {layers} layers per token"


def routed(layers: Sequence[RoutedLayer]) -> tuple[str, str]:
    """Return the mean share of tokens that ran in routed layers and their total overflow, in words."""
    rate = sum(layer.rate for layer in layers) / len(layers)
    return f"routed layers ran {100 * rate:.0f} % of tokens", f"overflow {sum(layer.overflow for layer in layers)}"


def depths(trace: Trace) -> dict[str, list[int]]:
    """Return the depths of prompt tokens and of generated tokens."""
    told = list(zip(trace.depth, trace.tokens, strict=True))
    return {
        "prompt": [depth for depth, token in told if token.is_prompt],
        "generated": [depth for depth, token in told if not token.is_prompt],
    }


def meanings(trace: Trace) -> list[tuple[list[int], str]]:
    """Return the legend: palette indices and their meaning, for those that the trace has."""
    if trace.paths:
        return [
            (list(ROUTED_RAN), "ran, from its first hop to its last"),
            ([], "numbers: its hops"),
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
    """Return the text about overflow that follows a layer's share; "" without overflow."""
    return f", overflow {layer.overflow}" if layer.overflow else ""
