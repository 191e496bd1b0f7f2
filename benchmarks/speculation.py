"""Time decoding with drafts beside decoding without, pair by pair, and compare their tokens.

    python benchmarks/speculation.py BUNDLE --threads 2 --rounds 5
    python benchmarks/speculation.py BUNDLE --draft 2 --most 4 --batch 8

Prompts of two kinds: "plain" asks for new text, "quoting" for text that stands in the prompt or repeats. Every round
runs both ways on every prompt, in turn; a ratio is the time of all tokens after the first without drafts / with them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from dynexport.runtime import Generation, Model, Piece, Sampling, Speculation, load

_PLAIN = (
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "What are the benefits of regular exercise?",
    "Describe how bread is made.",
)
_TEXT = (
    "The harbour of the old town was built in 1721 by Dutch engineers, who drained the marshes to the north and raised "
    "a wall of granite along the river. The wall still stands, and ships still tie up to its iron rings."
)
_CODE = (
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
    "    def add(self, other):\n        return Point(self.x + other.x, self.y + other.y)\n"
)
_QUOTING = (
    f"Repeat this text word for word: {_TEXT}",
    f"Correct this text and print all of it: {_TEXT.replace('harbour', 'harbor').replace('who', 'woh')}",
    f"Add a method subtract to this class and print the whole class:\n{_CODE}",
    "Write the numbers from one to ten in words, five times, one list per line.",
)


def timed(
    model: Model, prompts: list[list[int]], speculation: Speculation | None, how: argparse.Namespace
) -> tuple[float, list[list[int]], int]:
    """Return the seconds after the first step, the tokens per prompt, and the number of accepted drafts."""
    sampling = Sampling() if not how.temperature else Sampling(temperature=how.temperature, seed=1)
    pieces: list[Piece] = []
    stream = model.stream(
        prompts, max_new_tokens=how.new, sampling=sampling, depth="full", speculation=speculation, chat=True
    )
    pieces += [next(stream) for _ in prompts]
    begun = time.perf_counter()
    pieces += stream
    seconds = time.perf_counter() - begun
    done = [Generation(len(prompt)) for prompt in prompts]
    for piece in pieces:
        done[piece.row].push(piece)
    return seconds, [each.ids for each in done], sum(piece.draft == piece.token for piece in pieces)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", help="the depth that drafts; prompt lookup without it")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="rows: each prompt several times, cut differently")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    how = parser.parse_args()
    model = load(how.bundle, threads=how.threads)
    speculation = Speculation(how.most, None if how.draft is None else model.bundle.depth(how.draft))
    for kind, texts in (("plain", _PLAIN), ("quoting", _QUOTING)):
        chats = [model.text.chat([{"role": "user", "content": text}]) for text in texts]
        groups = [[chat] for chat in chats] if how.batch == 1 else [(chats * how.batch)[: how.batch]]
        timed(model, groups[0], speculation, how)
        ratios, milliseconds, accepted, count = [], [], 0, 0
        same = True
        for _ in range(how.rounds):
            plain = [timed(model, group, None, how) for group in groups]
            drafted = [timed(model, group, speculation, how) for group in groups]
            ratios.append(sum(each[0] for each in plain) / sum(each[0] for each in drafted))
            count = sum(len(ids) for each in drafted for ids in each[1])
            accepted = sum(each[2] for each in drafted)
            milliseconds.append(1e3 * sum(each[0] for each in drafted) / (count - how.batch * len(groups)))
            same = same and [each[1] for each in plain] == [each[1] for each in drafted]
        print(
            json.dumps(
                {
                    "kind": kind,
                    "ratio": round(statistics.median(ratios), 3),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                    "ms a token": round(statistics.median(milliseconds), 2),
                    "tokens": count,
                    "accepted": accepted,
                    "same tokens": same,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
