"""Time decoding with drafts beside decoding without, pair by pair, and compare their tokens.

    python benchmarks/speculation.py BUNDLE --threads 2 --rounds 5
    python benchmarks/speculation.py BUNDLE --draft 2 --most 4 --batch 8

Prompts of two kinds: "plain" asks for new text, "quoting" for text that stands in the prompt or repeats. What is
measured is what ``dynexport bench --speculate`` measures, on answers in a chat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dynexport.runtime import Model, Sampling, Speculation, load
from dynexport.runtime.measure.speculated import DraftedWork, Speculated, measure_drafts

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


def measured(model: Model, texts: Sequence[str], speculation: Speculation, how: argparse.Namespace) -> Speculated:
    """Measure one kind of prompts; with more rows than prompts, prompts run several times."""
    chats = [model.text.chat([{"role": "user", "content": text}]) for text in texts]
    groups = [[chat] for chat in chats] if how.batch == 1 else [(chats * how.batch)[: how.batch]]
    sampling = Sampling() if not how.temperature else Sampling(temperature=how.temperature, seed=1)
    full = model.bundle.manifest.full
    work = DraftedWork(groups, how.new, full, how.rounds, sampling, chat=True)
    return measure_drafts(model, work, [speculation])[0]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", help="the depth that drafts; prompt lookup without it")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="rows: each prompt several times")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    how = parser.parse_args()
    model = load(how.bundle, threads=how.threads)
    speculation = Speculation(how.most, None if how.draft is None else model.bundle.depth(how.draft))
    for kind, texts in (("plain", _PLAIN), ("quoting", _QUOTING)):
        print(json.dumps({"kind": kind, **measured(model, texts, speculation, how).model_dump()}), flush=True)


if __name__ == "__main__":
    main()
