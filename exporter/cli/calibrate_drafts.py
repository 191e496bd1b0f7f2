"""What ``dynexport calibrate --speculate`` measures, prints and stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynexport.exporter.bundle.drafting import store_drafting
from dynexport.exporter.cli.arguments import read_text
from dynexport.exporter.cli.bench_drafts import COLUMNS, figures, warn_of_drafts
from dynexport.exporter.cli.output import Output
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.model import Model
from dynexport.runtime.measure.draft_choice import choose_drafting


def calibrate_drafts(
    out: Output, bundle: Bundle, path: Path, *, window: int, max_tokens: int, threads: int
) -> dict[str, Any]:
    """Find the fastest way of drafting on a text, store it in the bundle's manifest, and return what was measured."""
    model = Model(bundle, threads)
    ids = model.text.encode(read_text(path, max_tokens))[: max(0, max_tokens)]
    with out.progress("measuring") as bar:
        chosen = choose_drafting(model, ids, window=window, progress=bar.update)
    store_drafting(bundle, chosen.drafting)
    out.table(f"{path.name}: the fastest first", COLUMNS, [figures(each) for each in chosen.measured])
    warn_of_drafts(out, chosen.measured[0])
    drafting, gain = chosen.drafting, chosen.measured[0].gain
    by = chosen.measured[0].drafter if drafting.keep is None else f"layers {', '.join(map(str, drafting.keep))}"
    told = f"{gain:.2f}x" if gain > 1 else f"none was faster than without drafts ({gain:.2f}x)"
    out.say(f"{bundle.path}: --speculate without a number now drafts up to {drafting.most} tokens by {by}: {told}")
    return {
        "text": str(path),
        "drafting": drafting.model_dump(mode="json"),
        "measured": [each.model_dump() for each in chosen.measured],
    }


__all__ = ["calibrate_drafts"]
