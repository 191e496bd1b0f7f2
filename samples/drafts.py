"""Answer a prompt with drafts and without, in turn: compare the text, time both, and draw what became of each draft.

python samples/drafts.py BUNDLE --prompt "Explain why the sky is blue." --picture drafts.svg
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svg import Picture

from dynexport.runtime import Generation, Model, Piece, Speculation, load

# An answer to the first is new text; an answer to the second quotes its prompt.
QUESTION = "Explain why the sky is blue."
CORRECTION = (
    "Correct the spelling of this text and print all of it: The harbour of the old town was bilt in 1721 by Dutch "
    "enginers, who drained the marshes to the north and raised a wall of granite along the river. The wall still "
    "stands, and ships still tie up to its iron rings."
)
ROUNDS, TOKENS = 5, 96
# Sizes in the picture, in pixels.
_WIDTH, _EDGE, _LINE, _BOX, _CHARACTER, _PAD, _GAP = 880, 24, 44, 22, 7.6, 5, 3


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: its text.
        draft: the text that was drafted in its place; None where nothing was drafted.
        accepted: whether the draft was this token.
    """

    text: str
    draft: str | None
    accepted: bool


def answer(model: Model, prompt: str, speculation: Speculation | None) -> tuple[float, list[Piece]]:
    """Return the seconds from the first token to the last, and the pieces of the answer."""
    ids = model.text.chat([{"role": "user", "content": prompt}])
    stream = model.stream([ids], max_new_tokens=TOKENS, depth="full", speculation=speculation, chat=True)
    pieces = [next(stream)]
    begun = time.perf_counter()
    pieces += stream
    return time.perf_counter() - begun, pieces


def compared(model: Model, prompt: str, speculation: Speculation) -> tuple[list[float], list[Piece], bool]:
    """Return the ratios of times without / with drafts, the answer with drafts, and whether all answers are equal."""
    answer(model, prompt, speculation)
    ratios, pieces, ids = [], list[Piece](), set[tuple[int, ...]]()
    for _ in range(ROUNDS):
        plain, without = answer(model, prompt, None)
        drafted, pieces = answer(model, prompt, speculation)
        ids |= {tuple(piece.token for piece in each) for each in (without, pieces)}
        ratios.append(plain / drafted)
    return ratios, pieces, len(ids) == 1


def tokens(model: Model, pieces: Sequence[Piece]) -> list[Token]:
    """Return the tokens of an answer with their texts."""
    text = model.text

    def shown(token: int) -> str:
        return text.decode([token]) or "<end>"

    return [
        Token(
            shown(piece.token),
            None if piece.draft is None else shown(piece.draft),
            piece.draft == piece.token,
        )
        for piece in pieces
    ]


def picture(found: Sequence[Token], title: str) -> str:
    """Return an SVG of the tokens in their order: accepted drafts, rejected ones above their tokens, and the others."""
    places, x, line = [], float(_EDGE), 0
    for token in found:
        words = token.text.replace("\n", "⏎")
        width = max(len(words), 1) * _CHARACTER + 2 * _PAD
        if x + width > _WIDTH - _EDGE:
            x, line = float(_EDGE), line + 1
        places.append((token, words, x, 96 + line * _LINE, width))
        x += width + _GAP
    image = Picture(_WIDTH, 96 + (line + 1) * _LINE, title)
    image.text(_EDGE, 34, title, 16, anchor="start", bold=True)
    for index, (look, words) in enumerate(
        (("green", "accepted draft"), ("amber", "its draft (above) was rejected"), ("empty", "not drafted"))
    ):
        image.rect(_EDGE + 250 * index, 48, 16, 16, look, radius=3)
        image.text(_EDGE + 24 + 250 * index, 61, words, 13, "soft", "start")
    for token, words, left, top, width in places:
        look = "empty" if token.draft is None else "green" if token.accepted else "amber"
        image.rect(left, top, width, _BOX, look, radius=4)
        image.text(left + width / 2, top + 16, words.strip(), 13)
        if token.draft is not None and not token.accepted:
            image.text(left + width / 2, top - 4, token.draft.strip().replace("\n", "⏎"), 10, "amber-ink")
    return image.svg()


def show(bundle: Path, prompt: str, path: Path, speculation: Speculation, threads: int | None = None) -> str:
    """Time a bundle with drafts and without, draw its drafts into a file, and return the result as a line."""
    model = load(bundle, threads=threads)
    ratios, pieces, same = compared(model, prompt, speculation)
    found = tokens(model, pieces)
    accepted, rejected = sum(token.accepted for token in found), sum(token.draft is not None for token in found)
    rejected -= accepted
    ratio = statistics.median(ratios)
    text = "the same text" if same else "another text (a tie of two tokens)"
    path.write_text(picture(found, f"{len(found)} tokens, {ratio:.2f} times as fast with drafts, {text}"))
    done = Generation(0)
    for piece in pieces:
        done.push(piece)
    return (
        f"{model.text.decode(done.ids)}\n\nWith drafts {ratio:.2f} times as fast ({min(ratios):.2f} to "
        f"{max(ratios):.2f} in {ROUNDS} rounds), {text}: {accepted} of {len(found)} tokens were accepted drafts, "
        f"{rejected} drafts were rejected. Picture: {path}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default=CORRECTION)
    parser.add_argument("--picture", type=Path, default=Path("drafts.svg"))
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--threads", type=int)
    how = parser.parse_args()
    print(show(how.bundle, how.prompt, how.picture, Speculation(how.most), how.threads))


if __name__ == "__main__":
    main()
