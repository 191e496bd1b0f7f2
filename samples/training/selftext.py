"""Text that a model writes itself, with the hidden states of its last layer: the training data of adapters.

    python samples/training/selftext.py MODEL --bundle BUNDLE -o build/selftext --answers 2000
    python samples/training/selftext.py MODEL --text book.txt -o build/selftext

A bundle answers questions about many subjects, greedily and by sampling; PyTorch then computes the normed hidden states
that each token was chosen from, so that training needs no second forward pass of the teacher. A text that the model did
not write is cut into windows instead. Files have 32 answers or windows and are written one by one: a stopped run goes
on with the next, and runs with other seeds or texts may share a directory.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynexport.exporter.checkpoint import Checkpoint, open_checkpoint
from dynexport.exporter.reference.loading import load_pretrained
from dynexport.runtime import Sampling, load
from dynexport.runtime.text.text import Text

# One file in this many is seen by no training.
HELD_OUT = 16
ANSWERS, TOKENS = 32, 128
# Tokens of a window of text, and those of its prompt.
WINDOW, PROMPT = 256, 32
_SUBJECTS = Path(__file__).with_name("subjects.txt")


@dataclass(frozen=True)
class Answer:
    """A prompt and the model's answer.

    Attributes:
        prompt: int64 [P], token ids.
        tokens: int64 [T], the answer.
        hidden: float32 [T, hidden], the normed hidden states that its tokens were chosen from.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    hidden: torch.Tensor


def answers(directory: Path, *, held_out: bool) -> Iterator[Answer]:
    """Yield the answers of a directory's files, in the order of their names."""
    for path in sorted(directory.glob("answers-*.npz")):
        number = int(path.stem.rpartition("-")[2])
        if (number % HELD_OUT == 0) != held_out:
            continue
        with np.load(path) as found:
            parts = {name: found[name] for name in ("ids", "prompts", "lengths", "hidden")}
        for ids, prompt, length, hidden in zip(*parts.values(), strict=True):
            whole = torch.from_numpy(ids[:length].astype(np.int64))
            states = torch.from_numpy(hidden[: length - prompt].astype(np.float32))
            yield Answer(whole[:prompt], whole[prompt:], states)


def questions(seed: int) -> Iterator[str]:
    """Yield questions without end: a form of the file's first part, with subjects of its second."""
    forms, subjects = (part.splitlines() for part in _SUBJECTS.read_text().split("\n\n"))
    draw = random.Random(seed)
    while True:
        form = draw.choice(forms)
        yield form.format(*draw.sample([line for line in subjects if line], form.count("{}")))


def states(model: Any, ids: list[int], prompt: int) -> np.ndarray:
    """Return the normed hidden states that the tokens after a prompt were chosen from, float16 [T, hidden]."""
    with torch.no_grad():
        found = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, prompt - 1 : -1]
    return np.asarray(found.half().numpy())


def save(path: Path, model: Any, rows: list[tuple[list[int], int]]) -> None:
    """Write the answers ``rows``, each with the length of its prompt, and their states."""
    longest = max(len(ids) for ids, _ in rows)
    most = max(len(ids) - prompt for ids, prompt in rows)
    hidden = np.zeros((len(rows), most, model.config.hidden_size), np.float16)
    for row, (ids, prompt) in enumerate(rows):
        hidden[row, : len(ids) - prompt] = states(model, ids, prompt)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(
            file,
            ids=np.array([ids + [0] * (longest - len(ids)) for ids, _ in rows], np.int32),
            prompts=np.array([prompt for _, prompt in rows]),
            lengths=np.array([len(ids) for ids, _ in rows]),
            hidden=hidden,
        )
    part.replace(path)


def write_answers(directory: Path, bundle: Path, model: Any, *, count: int, seed: int, threads: int) -> None:
    """Write files of the bundle's own answers."""
    runtime, asked = load(bundle, threads=threads), questions(seed)
    for number in range(-(-count // ANSWERS)):
        path = directory / f"answers-{seed}-{number:05d}.npz"
        chats = [runtime.text.chat([{"role": "user", "content": next(asked)}]) for _ in range(ANSWERS)]
        if path.exists():
            continue
        # Two of three greedily, as a draft is judged by greedy choices most often.
        sampling = [Sampling(temperature=0.8 if row % 3 == 0 else 0.0, seed=number) for row in range(ANSWERS)]
        done = runtime.generate(chats, max_new_tokens=TOKENS, sampling=sampling, chat=True)
        rows = [([*chat, *each.ids], len(chat)) for chat, each in zip(chats, done, strict=True)]
        save(path, model, [row for row in rows if len(row[0]) > row[1]])
        print(path, sum(len(ids) - prompt for ids, prompt in rows), "tokens", flush=True)


def write_windows(directory: Path, checkpoint: Checkpoint, text: Path, model: Any) -> None:
    """Write files of windows of a text that the model did not write: the first tokens of each are its prompt."""
    ids = Text.from_files(checkpoint.files).encode(text.read_text(encoding="utf-8"))
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    for number, start in enumerate(range(0, len(windows), ANSWERS)):
        path = directory / f"answers-{text.stem}-{number:05d}.npz"
        if not path.exists():
            save(path, model, [(window, PROMPT) for window in windows[start : start + ANSWERS]])
            print(path, flush=True)


def main() -> None:
    """Write files of answers, or of windows of a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, a directory or a .gguf file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, help="a dense bundle of the model, which answers questions")
    source.add_argument("--text", type=Path, help="a UTF-8 text that is cut into windows")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    how = parser.parse_args()
    torch.set_num_threads(how.threads)
    how.output.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(how.model)
    model = load_pretrained(checkpoint)
    if how.text is not None:
        write_windows(how.output, checkpoint, how.text, model)
    else:
        write_answers(how.output, how.bundle, model, count=how.answers, seed=how.seed, threads=how.threads)


if __name__ == "__main__":
    main()
