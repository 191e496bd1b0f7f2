"""The vocabulary of a GGUF file: its tokens, their kinds and their roles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dynexport.exporter.checkpoint.end_tokens import ends_by_text, parts_by_text
from dynexport.exporter.checkpoint.gguf_metadata import Metadata


class Kind(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Roles of tokens: each has a key tokenizer.ggml.{role}_token_id.
_ROLES = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")
_ENDING_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Ids of a role by tokenizer model, for files without its key, as in llama.cpp.
_DEFAULT_ROLES: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}
# Texts by which llama.cpp finds the token of a role, for files without its key.
_ROLES_BY_TEXT: Mapping[str, list[str]] = {
    role: texts.split()
    for role, texts in {
        "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <\uff5cfim\u2581begin\uff5c> <PRE> \u2581<PRE> "
        "<|code_prefix|> <|prefix|>",
        "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> \u2581<SUF> "
        "<|code_suffix|> <|suffix|>",
        "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <\uff5cfim\u2581end\uff5c> <MID> \u2581<MID> "
        "<|code_middle|> <|middle|>",
        "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
        "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
        "fim_sep": "<|file_sep|>",
    }.items()
}
# Marks of an answer's parts in OpenAI's harmony format; decoding keeps them in the text.
_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file with their kinds, scores and roles.

    Attributes:
        model: the value of ``tokenizer.ggml.model``, or "" if the file has none.
        tokens: the texts of the tokens, in the order of their ids; no two are equal.
        kinds: the ``Kind`` of each token.
        scores: the score of each token; zeros if the file has none.
        roles: the token id of each role, such as "bos", "eos" and "padding".
        ends: the token ids that end an answer, "eos" first.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    roles: Mapping[str, int]
    ends: tuple[int, ...]


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Return the tokens of a file, with the kinds and roles that llama.cpp gives them.

    Raises:
        DynexportError: when a list is too short, a token repeats, or the id of a role is not in the vocabulary.
    """
    model = metadata.optional("tokenizer.ggml.model", str, "a string") or ""
    tokens = metadata.optional("tokenizer.ggml.tokens", list, "a list of strings") or []
    if not all(isinstance(token, str) for token in tokens):
        raise metadata.error("tokenizer.ggml.tokens", "a list of strings")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise metadata.error("tokenizer.ggml.tokens", f"{len(tokens)} different tokens")
    roles = _roles(metadata, model, ids)
    kinds = _numbers(metadata, "token_type", (int,), len(tokens), default=Kind.NORMAL)
    ends = [roles[role] for role in _ENDING_ROLES if role in roles]
    by_text = ends_by_text(ids)
    ends += sorted(ids[token] for token in by_text)
    parts = {ids[token] for token in parts_by_text(ids)}
    for token in (*by_text, *(text for texts in _ROLES_BY_TEXT.values() for text in texts)):
        if token in ids:
            kinds[ids[token]] = Kind.CONTROL
    for token in _SHOWN.intersection(ids):
        kinds[ids[token]] = Kind.USER_DEFINED
    for token_id in parts:
        kinds[token_id] = Kind.NORMAL if tokens[token_id] == "</s>" else Kind.USER_DEFINED
    scores = _numbers(metadata, "scores", (int, float), len(tokens), default=0.0)
    return Vocabulary(model, tokens, kinds, scores, roles, tuple(i for i in dict.fromkeys(ends) if i not in parts))


def _numbers(metadata: Metadata, name: str, kinds: tuple[type, ...], count: int, default: float) -> list[Any]:
    """Return one number per token; ``default`` for each if the file has no such list."""
    key = f"tokenizer.ggml.{name}"
    values = metadata.optional(key, list, "a list of numbers")
    if values is None:
        return [default] * count
    if len(values) < count or not all(type(value) in kinds and math.isfinite(value) for value in values):
        raise metadata.error(key, f"a list of {count} finite numbers, one per token")
    return list(values[:count])


def _roles(metadata: Metadata, model: str, ids: Mapping[str, int]) -> dict[str, int]:
    """Return the token id of each role: from its key, else by its text, else the model's default."""
    defaults = _DEFAULT_ROLES.get(model, {})
    found: dict[str, int] = {}
    for role in (*_ROLES, *_ROLES_BY_TEXT):
        token_id = metadata.token(role)
        if token_id is None:
            by_text = (ids[text] for text in _ROLES_BY_TEXT.get(role, ()) if text in ids)
            default = defaults.get(role, len(ids))
            token_id = next(by_text, default if default < len(ids) else None)
        elif ids and not 0 <= token_id < len(ids):
            raise metadata.error(f"tokenizer.ggml.{role}_token_id", f"an id below {len(ids)}")
        if token_id is not None:
            found[role] = token_id
    return found
