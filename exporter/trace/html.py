"""Render a trace as one self-contained HTML page, without scripts, fonts or images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from dynexport.exporter.trace import colours, look
from dynexport.exporter.trace.model import Trace

_PAGE = Path(__file__).with_name("page.html.jinja")
_LONGEST_BAR = 480  # pixels


def render(trace: Trace) -> bytes:
    """Return the page as UTF-8; token texts are escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    return page.render(
        themes=(colours.LIGHT, colours.DARK),
        legible=colours.legible,
        skipping=[place for place in range(len(colours.LIGHT.palette)) if not colours.ran(place)],
        headline=look.headline(trace),
        facts=look.facts(trace),
        meanings=look.meanings(trace),
        prompt_tokens=trace.prompt_tokens,
        columns=list(_columns(trace)),
        shading=_shading(trace),
        rows=list(_rows(trace)),
        means=[(name, f"{sum(depths) / len(depths):.1f}") for name, depths in look.depths(trace).items() if depths],
        bars=list(_bars(trace)),
    ).encode()


def _columns(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the template fields of every token."""
    low, span = min(trace.depth), max(trace.depth) - min(trace.depth)
    shades = (np.array(trace.depth) - low) * (len(colours.LIGHT.depths) - 1) // max(1, span)
    for place, (token, depth) in enumerate(zip(trace.tokens, trace.depth, strict=True)):
        yield {
            "is_prompt": token.is_prompt,
            "depth": depth,
            "shade": int(shades[place]),
            "label": look.label(token),
            "words": look.readable(token),
            "separate": token.text is None,
            "title": f"token {place}: {_name(trace, place)}, id {token.id}; ran in {depth} of {trace.layers} layers"
            + (f": {', '.join(map(str, trace.paths[place]))}" if trace.paths and depth else ""),
        }


def _shading(trace: Trace) -> str:
    low, high = min(trace.depth), max(trace.depth)
    return (
        f"The stronger the colour, the more layers a token ran in: {low} to {high}."
        if low < high
        else f"Every token ran in {low}."
    )


def _rows(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the name and cells of every layer, the last layer first; a cell is (palette index, title, hops)."""
    places = look.cells(trace)
    routed = {layer.layer: number for number, layer in enumerate(trace.routed)}
    names = [f"{_name(trace, place)}, token {place}" for place in range(len(trace.tokens))]
    steps = look.steps(trace)
    for layer in reversed(range(trace.layers)):
        number = routed.get(layer)
        share = sum(trace.ran[layer]) / len(trace.tokens)
        full = look.overflow(trace.routed[number]) if number is not None else ""
        numbers = [steps.get((layer, place), "") for place in range(len(names))]
        titles = (
            f"{name}; layer {layer}: {'ran' if ran else 'did not run'}{f' in hop {number}' if number else ''}"
            for name, ran, number in zip(names, trace.ran[layer], numbers, strict=True)
        )
        if number is not None:
            told = zip(titles, trace.scores[number], trace.margins[number], strict=True)
            titles = (f"{title}; score {_number(score)}, margin {_number(margin)}" for title, score, margin in told)
        yield {
            "routed": number is not None,
            "name": f"{'◆ ' if number is not None else ''}{layer} · {100 * share:.0f} %{full}",
            "cells": list(zip(places[layer].tolist(), titles, numbers, strict=True)),
        }


def _bars(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the number of tokens for every depth from the smallest to the largest."""
    shallowest, deepest = min(trace.depth), max(trace.depth)
    counts = {
        name: np.bincount(depths, minlength=deepest + 1).tolist() if depths else [0] * (deepest + 1)
        for name, depths in look.depths(trace).items()
    }
    most = max(map(sum, zip(*counts.values(), strict=True)))
    for depth in range(shallowest, deepest + 1):
        prompt, generated = counts["prompt"][depth], counts["generated"][depth]
        yield {
            "depth": depth,
            "count": prompt + generated,
            "prompt": round(_LONGEST_BAR * prompt / most, 1),
            "generated": round(_LONGEST_BAR * generated / most, 1),
            "title": f"layers: {depth}, tokens of the prompt: {prompt}, generated: {generated}",
        }


def _name(trace: Trace, place: int) -> str:
    """Return a token's name for a title: its text in quotes, or its id."""
    text = trace.tokens[place].text
    return str(trace.tokens[place].id) if text is None else f"“{look.visible(text)}”"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
