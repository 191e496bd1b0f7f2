"""Write the tables of limits in docs/verification.md from the code: `python samples/docs_limits.py`."""

from __future__ import annotations

import math
from pathlib import Path

from docs_families import DOCS, markdown, with_table

from dynexport.exporter.parity.thresholds import LIMITS, TENSORRT_LIMITS, Limits, RouteLimits

PAGE = DOCS / "verification.md"
# TensorRT has its own rows only where its limits differ.
NAMED = {f"`{precision}`": limits for precision, limits in LIMITS.items()} | {
    f"`{precision}`, TensorRT": limits
    for precision, limits in TENSORRT_LIMITS.items()
    if limits != LIMITS.get(precision)
}


def table() -> str:
    """Return the table of limits, one row per precision and kind of check; equal limits share a row."""
    rows = []
    for name, limits in NAMED.items():
        kinds: dict[Limits, list[str]] = {}
        # Kernels for bfloat16 round activations, which nothing turns off.
        if math.isinf(limits.skipped.mean_kl) and name != "`bf16`":
            kinds[limits.of("arithmetic", skipped=False)] = ["PyTorch with the rounded weights"]
        for kind, limit in (
            ("PyTorch, every layer", limits.full),
            ("PyTorch, layers skipped", limits.skipped),
            ("itself", limits.consistency),
        ):
            kinds.setdefault(limit, []).append(kind)
        rows += [[name, "; ".join(held), *_figures(limit)] for limit, held in kinds.items()]
    columns = ["Precision", "Held to", "Largest error", "Mean KL, nats", "Equal tokens", "Layer diverges at"]
    return markdown(columns, rows)


def _figures(limit: Limits) -> list[str]:
    if math.isinf(limit.mean_kl):
        return ["reported"] * 3 + [f"{limit.layer:g}"]
    error = "not judged" if limit.error is None else f"{limit.error[0]:g} or {limit.error[1]:g} x spread"
    return [error, f"{limit.mean_kl:g}", f"{limit.agreement:.0%}", f"{limit.layer:g}"]


def routes_table() -> str:
    """Return the table of limits of decisions, one row per precision."""
    rows = [
        [
            name,
            _margin(limits.routes),
            f"{limits.routes.agreement:.0%}",
        ]
        for name, limits in NAMED.items()
    ]
    return markdown(["Precision", "Flips up to a margin of", "Equal decisions"], rows)


def _margin(limits: RouteLimits) -> str:
    if limits.margin is None:
        return "not judged"
    absolute, share = limits.margin
    return f"{absolute:g}" + (f" or {share:g} x mean margin" if share else "")


def page() -> str:
    """Return the text of docs/verification.md with the tables of the code."""
    name = Path(__file__).name
    return with_table(with_table(PAGE.read_text(), name, table()), f"{name}, decisions", routes_table())


if __name__ == "__main__":
    PAGE.write_text(page())
