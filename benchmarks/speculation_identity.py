"""Count the greedy tokens that drafts change, and tell near-ties from mistakes by the margin of the logits.

    python benchmarks/speculation_identity.py BUNDLE TEXT.. --tokens 10000

Windows of the texts are continued greedily without drafts and with them; every step drafts as many tokens as it can,
whether that pays or not. Where a token differs, its margin (the difference of the two largest log probabilities without
drafts) is compared with what rounding alone does to logits: the largest difference between those of single tokens and
those of calls of several tokens, on the same text. After a difference both go on from the text without drafts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dynexport.runtime import Model, Piece, Sampling, Speculation, load
from dynexport.runtime.execution.batch import Batch

_WITH_MARGINS = Sampling(logprobs=2)


def rounding(model: Model, ids: Sequence[int], size: int) -> float:
    """Return the largest difference of logits between single tokens and calls of ``size`` tokens."""
    executor, full, half = model.executor, model.bundle.manifest.full, len(ids) // 2
    found = []
    for step in (1, size):
        cache = executor.full_cache(1, len(ids))
        executor.prefill(cache, [ids[:half]])
        parts = [ids[first : first + step] for first in range(half, len(ids), step)]
        runs = [executor.run(cache, Batch([0], [part], "decode", full, "all")) for part in parts]
        found.append(np.concatenate([run.logits[0] for run in runs]))
    return float(np.abs(found[0] - found[1]).max())


def answer(model: Model, prompt: Sequence[int], tokens: int, drafts: Speculation | None) -> list[Piece]:
    """Continue a prompt greedily."""
    return list(model.stream([prompt], max_new_tokens=tokens, sampling=_WITH_MARGINS, depth="full", speculation=drafts))


def margin(piece: Piece) -> float:
    """Return the difference of the two largest log probabilities."""
    assert piece.logprobs is not None
    (_, first), (_, second), *_ = piece.logprobs.top
    return first - second


def compared(model: Model, prompt: list[int], tokens: int, drafts: Speculation) -> Iterator[tuple[Piece, Piece | None]]:
    """Yield every token without drafts, and the one with drafts where it differs."""
    while tokens > 0:
        plain, drafted = (answer(model, prompt, tokens, how) for how in (None, drafts))
        pairs = list(zip(plain, drafted, strict=False))
        equal = next((place for place, (one, other) in enumerate(pairs) if one.token != other.token), len(pairs))
        for place, (one, other) in enumerate(pairs[: equal + 1]):
            yield one, other if place == equal else None
        if equal == len(pairs):
            return
        prompt, tokens = [*prompt, *(one.token for one, _ in pairs[: equal + 1])], tokens - equal - 1


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--window", type=int, default=128, help="tokens of a prompt, and of its continuation")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--draft", help="the depth that drafts; prompt lookup without it")
    parser.add_argument("--threads", type=int, default=2)
    how = parser.parse_args()
    model = load(how.bundle, threads=how.threads)
    drafts = Speculation(how.most, None if how.draft is None else model.bundle.depth(how.draft), always=True)
    ids = [token for text in how.texts for token in model.text.encode(text.read_text())]
    largest = max(rounding(model, ids[at : at + 2 * how.window], how.most + 1) for at in range(0, 2048, 512))
    count = 0
    margins: list[float] = []
    for first in range(0, len(ids) - how.window, how.window):
        for piece, other in compared(model, ids[first : first + how.window], how.window, drafts):
            count += 1
            if other is not None:
                margins.append(margin(piece))
        if count >= how.tokens:
            break
    found = {
        "tokens": count,
        "different": len(margins),
        "margins": [round(value, 5) for value in sorted(margins)],
        "rounding of logits": largest,
        "outside near-ties": sum(value > 2 * largest for value in margins),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
