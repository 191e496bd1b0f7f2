"""What ``dynexport calibrate --ngrams`` learns, prints and stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.exporter.bundle.drafting import store_ngrams
from dynexport.exporter.bundle.ngrams import learn_ngrams
from dynexport.exporter.cli.arguments import read_text
from dynexport.exporter.cli.output import Output
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.text.text import Text

# A text's further tokens are not used: more would not fit the table.
_MOST_TOKENS = 1 << 22


def calibrate_ngrams(out: Output, bundle: Bundle, paths: Sequence[Path], *, window: int) -> dict[str, Any]:
    """Learn a table of what follows short token sequences of some texts, store it in the bundle, and return a report.

    Args:
        out: the command's output.
        bundle: the bundle; open it again afterwards.
        paths: UTF-8 texts like the answers.
        window: tokens of a window; a sequence counts once in each.

    Raises:
        DynexportError: for a text that cannot be read, texts without a sequence that comes twice, or a bundle that
            cannot be written to.
    """
    text = Text.of_bundle(bundle)
    windows: list[np.ndarray] = []
    for path in paths:
        ids = text.encode(read_text(path, _MOST_TOKENS), add_special_tokens=False)[:_MOST_TOKENS]
        windows += [np.array(ids[start : start + window], np.int64) for start in range(0, len(ids), max(1, window))]
    windows = windows[: _MOST_TOKENS // max(1, window)]
    tokens = sum(map(len, windows))
    learned = learn_ngrams(windows)
    if learned is None:
        raise DynexportError(f"ngrams: expected texts in which some tokens follow others again, found {tokens} tokens")
    stored = store_ngrams(bundle, learned, tokens)
    out.say(
        f"{bundle.path}: {stored.entries} entries from {tokens} tokens in {stored.file}; of the tokens that they "
        f"foresee, {stored.acceptance:.0%} are expected to be right"
    )
    return {"texts": [str(path) for path in paths], **stored.model_dump(mode="json")}


__all__ = ["calibrate_ngrams"]
