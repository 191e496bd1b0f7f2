"""Tokens that the side files of a tokenizer add, and notes on their ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dynexport.exporter.checkpoint.small_files import parse_object


def added_tokens(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``added_tokens_decoder`` of tokenizer_config.json, id -> flags; empty if it has another form."""
    added = settings.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return {}
    return {
        token_id: token
        for token_id, token in added.items()
        if token_id.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def extra_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Return the additional special tokens of tokenizer_config.json."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    texts = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {text for text in texts if isinstance(text, str)}


def notes_on_ids(
    tokenizer: Tokenizer, directory: Path, sides: Mapping[str, bytes], settings: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a note if added tokens have other ids than in the files."""
    declared = parse_object(sides.get("added_tokens.json", b"{}"), directory / "added_tokens.json")
    declared |= {token["content"]: int(token_id) for token_id, token in added_tokens(settings).items()}
    moved = {text: token_id for text, token_id in declared.items() if tokenizer.token_to_id(text) != token_id}
    if not moved:
        return ()
    text, token_id = next(iter(moved.items()))
    return (
        f"tokenizer: {len(moved)} added tokens have transformers' ids, which differ from those in the files: "
        f"{text!r:.60} is {tokenizer.token_to_id(text)}, the file says {token_id!r:.20}",
    )


def notes_beyond(tokenizer: Tokenizer, directory: Path, sides: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return a note if the model has no embedding for some added tokens."""
    size = parse_object(sides.get("config.json", b"{}"), directory / "config.json").get("vocab_size")
    added = tokenizer.get_added_tokens_decoder().items()
    beyond = [token.content for token_id, token in added if isinstance(size, int) and token_id >= size]
    if not beyond:
        return ()
    shown = ", ".join(map(repr, beyond[:3]))
    return (
        f"tokenizer: {len(beyond)} of its tokens have ids of {size} or more, outside the model's vocabulary "
        f"({shown:.200}); prompts with them are refused",
    )


__all__ = ["added_tokens", "extra_tokens", "notes_beyond", "notes_on_ids"]
