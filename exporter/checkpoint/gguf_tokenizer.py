"""The tokenizer of a GGUF file, converted to the tokenizer files of a bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

from dynexport.exporter.checkpoint.gguf_metadata import Metadata
from dynexport.exporter.checkpoint.gguf_pre_tokenizers import SPLITTINGS, Splitting
from dynexport.exporter.checkpoint.gguf_sampling import read_sampling
from dynexport.exporter.checkpoint.gguf_vocabulary import Kind, Vocabulary, read_vocabulary
from dynexport.exporter.checkpoint.small_files import ANOTHER_TOKENIZER
from dynexport.exporter.checkpoint.tokenizer_files import TokenizerFiles, notes_on_templates, tokenizer_settings
from dynexport.runtime.bundle.errors import DynexportError, told_as
from dynexport.runtime.bundle.text_files import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE

_GENERATION = "generation_config.json"
_NO_VOCABULARY = ("", "none", "no_vocab")
_SPACE = "\u2581"
# A limit for the length of pieces, because every way to cut a piece in two is tried.
_LONGEST_PIECE = 256
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "mask": "mask_token",
}
# Keys under tokenizer. that are read, and keys that change neither ids nor text.
_READ = (
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges", "ggml.add_bos_token"),
    *("ggml.add_eos_token", "ggml.add_space_prefix", "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap"),
    *("ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id", "ggml.unknown_token_id"),
    *("ggml.seperator_token_id", "ggml.padding_token_id", "ggml.mask_token_id", "ggml.fim_pre_token_id"),
    *("ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id"),
    *("ggml.fim_sep_token_id", "chat_template", "chat_templates"),
)
_HARMLESS = (
    *("ggml.token_type_count", "ggml.add_sep_token", "ggml.prefix_token_id", "ggml.suffix_token_id"),
    *("ggml.middle_token_id", "ggml.cls_token_id", "huggingface.json", "rwkv.world"),
)
# In models with these names, spaces after a special token belong to it; no key of the file says so.
_STRIPPING_NAMES = ("phi-3", "phi3")
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_files(metadata: Metadata, *, build: bool) -> TokenizerFiles:
    """Return the files of a tokenizer that gives llama.cpp's ids, and ``generation_config.json``.

    Args:
        metadata: the metadata of the GGUF file.
        build: whether to make ``tokenizer.json``; False if the user names another.

    Raises:
        DynexportError: when the vocabulary is damaged, or its model or its pre-tokenizer is not supported.
    """
    vocabulary = read_vocabulary(metadata)
    templates = _read_templates(metadata)
    sampling, notes = read_sampling(metadata)
    notes += notes_on_templates(templates)
    files = {_GENERATION: json.dumps({**_generation(vocabulary), **sampling}, indent=2).encode()}
    named = {name: vocabulary.roles[role] for role, name in _NAMED.items() if role in vocabulary.roles}
    if vocabulary.tokens:
        files[CONFIG_FILE] = tokenizer_settings({name: vocabulary.tokens[i] for name, i in named.items()}, templates)
    if "default" in templates:
        files[TEMPLATE_FILE] = templates["default"].encode()
    if build and (vocabulary.tokens or vocabulary.model not in _NO_VOCABULARY):
        files[TOKENIZER_FILE] = _build(metadata, vocabulary).to_str().encode()
        notes += _notes(metadata, vocabulary)
    return TokenizerFiles(files, notes)


def _generation(vocabulary: Vocabulary) -> dict[str, Any]:
    ends = list(vocabulary.ends)
    fields = {
        "bos_token_id": vocabulary.roles.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.roles.get("padding"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _read_templates(metadata: Metadata) -> dict[str, str]:
    """Return the chat templates by name; the one without a name is ``default``."""
    key = "tokenizer.chat_template"
    keys = {name.removeprefix(f"{key}."): name for name in metadata.header.metadata if name.startswith(f"{key}.")}
    found = {name: metadata.optional(at, str, "a string") for name, at in {**keys, "default": key}.items()}
    if found["default"] is None:
        found["default"] = metadata.optional(f"{key}.default", str, "a string")
    return {name: text for name, text in found.items() if text is not None}


def _notes(metadata: Metadata, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return notes on the tokenizer's keys that are ignored, and on a default that is assumed."""
    known = {*(f"tokenizer.{key}" for key in (*_READ, *_HARMLESS))}
    others = [
        key
        for key in metadata.header.metadata
        if key.startswith("tokenizer.") and key not in known and not key.startswith("tokenizer.chat_template.")
    ]
    notes = []
    if vocabulary.model == "gpt2" and not metadata.optional("tokenizer.ggml.pre", str, "a string"):
        notes.append("tokenizer.ggml.pre: the file has none; text is split by llama.cpp's default rule")
    if others:
        notes.append(f"tokenizer: ignored unknown keys: {', '.join(others):.300}")
    return tuple(notes)


def _build(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    if not vocabulary.tokens:
        raise metadata.error("tokenizer.ggml.tokens", "a list of strings")
    if vocabulary.model == "llama":
        tokenizer, begins, ends = _sentencepiece(metadata, vocabulary), True, False
    elif vocabulary.model == "t5":
        tokenizer, begins, ends = _unigram(metadata, vocabulary), False, True
    elif vocabulary.model in ("gpt2", "gemma4"):
        splitting = _splitting(metadata, vocabulary)
        build = _byte_level if splitting.spelled == "bytes" else _merged_text
        tokenizer, begins, ends = build(metadata, vocabulary, splitting), splitting.begins, False
    else:
        raise _unsupported(metadata, "tokenizer.ggml.model", "llama, gpt2, gemma4 or t5")
    _add_tokens(tokenizer, metadata, vocabulary)
    tokenizer.post_processor = _frame(metadata, vocabulary, begins=begins, ends=ends)
    return tokenizer


def _unsupported(metadata: Metadata, key: str, expected: str) -> DynexportError:
    found = metadata.header.metadata.get(key)
    return DynexportError(
        f"{metadata.header.path}: metadata {key}: expected {expected}, found {found!r:.80}; {ANOTHER_TOKENIZER}"
    )


def _splitting(metadata: Metadata, vocabulary: Vocabulary) -> Splitting:
    name = metadata.optional("tokenizer.ggml.pre", str, "a string") or "default"
    if vocabulary.model == "gemma4":
        name = "gemma4"
    if name not in SPLITTINGS:
        raise _unsupported(metadata, "tokenizer.ggml.pre", "a name that llama.cpp knows for text models")
    return SPLITTINGS[name]


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    """Return the merges as pairs of tokens; a leading space belongs to the first token."""
    merges = metadata.optional("tokenizer.ggml.merges", list, "a list of strings")
    if merges is None:
        raise _unsupported(metadata, "tokenizer.ggml.merges", "a list of pairs")
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0:
            raise DynexportError(
                f"{metadata.header.path}: metadata tokenizer.ggml.merges: expected pairs of tokens, found "
                f"{merge!r:.80}; {ANOTHER_TOKENIZER}"
            )
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _bpe(metadata: Metadata, vocabulary: Vocabulary, pairs: Sequence[tuple[str, str]], **options: Any) -> Tokenizer:
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    with told_as(
        f"{metadata.header.path}: metadata tokenizer.ggml.merges: expected pairs of tokens, found others; "
        f"{ANOTHER_TOKENIZER}"
    ):
        return Tokenizer(BPE(ids, list(pairs), **options))


def _byte_level(metadata: Metadata, vocabulary: Vocabulary, splitting: Splitting) -> Tokenizer:
    """Return a byte-level BPE tokenizer (GPT-2's alphabet) with the merges of the file."""
    tokenizer = _bpe(metadata, vocabulary, _merges(metadata), ignore_merges=splitting.whole_words)
    tokenizer.normalizer = splitting.normalizer()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merged_text(metadata: Metadata, vocabulary: Vocabulary, splitting: Splitting) -> Tokenizer:
    """Return a BPE tokenizer with a mark for spaces and byte fallback, with the merges of the file."""
    tokenizer = _bpe(metadata, vocabulary, _merges(metadata), **_bytes_for_unknown(vocabulary))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = _text_decoder(starts_with_space=False)
    return tokenizer


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """Return a SentencePiece BPE tokenizer, which merges the pieces with the best score first."""
    prefix = metadata.optional("tokenizer.ggml.add_space_prefix", bool, "true or false") in (None, True)
    pairs = _pairs_by_score(metadata, vocabulary)
    tokenizer = _bpe(metadata, vocabulary, pairs, **_bytes_for_unknown(vocabulary))
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = _text_decoder(starts_with_space=prefix)
    return tokenizer


def _pairs_by_score(metadata: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes another piece, best score first."""
    pieces = set(vocabulary.tokens)
    scored: list[tuple[float, str, str]] = []
    for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True):
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE):
            continue
        if len(token) > _LONGEST_PIECE and kind != Kind.USER_DEFINED:
            raise metadata.error("tokenizer.ggml.tokens", f"pieces of at most {_LONGEST_PIECE} characters")
        halves = ((token[:cut], token[cut:]) for cut in range(1, min(len(token), _LONGEST_PIECE)))
        scored += [(score, left, right) for left, right in halves if left in pieces and right in pieces]
    scored.sort(key=lambda pair: -pair[0])
    return [(left, right) for _, left, right in scored]


def _unigram(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """Return a Unigram tokenizer with a mark for spaces."""
    merges = metadata.optional("tokenizer.ggml.remove_extra_whitespaces", bool, "true or false") or False
    prefix = metadata.optional("tokenizer.ggml.add_space_prefix", bool, "true or false") or merges
    charsmap = metadata.optional("tokenizer.ggml.precompiled_charsmap", list, "a list of bytes")
    told = zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True)
    pieces = [(token, 0.0 if kind == Kind.USER_DEFINED else score) for token, kind, score in told]
    steps: list[normalizers.Normalizer] = []
    with told_as(
        f"{metadata.header.path}: metadata tokenizer.ggml: expected a Unigram vocabulary, found another; "
        f"{ANOTHER_TOKENIZER}"
    ):
        tokenizer = Tokenizer(Unigram(pieces, unk_id=vocabulary.roles.get("unknown"), byte_fallback=False))
        if charsmap:
            steps.append(normalizers.Precompiled(bytes(byte % 256 for byte in charsmap)))
    if merges:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = _text_decoder(starts_with_space=prefix)
    return tokenizer


def _bytes_for_unknown(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the BPE options for characters that have no token: bytes, else the unknown token."""
    unknown = vocabulary.roles.get("unknown")
    text = None if unknown is None else vocabulary.tokens[unknown]
    return {"unk_token": text, "fuse_unk": True, "byte_fallback": True}


def _text_decoder(*, starts_with_space: bool) -> decoders.Decoder:
    """Return a decoder that restores spaces and bytes, and removes the space that encoding added in front."""
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if starts_with_space else steps)


def _add_tokens(tokenizer: Tokenizer, metadata: Metadata, vocabulary: Vocabulary) -> None:
    """Add the tokens that are matched before text is split; control tokens are special, user-defined ones are not."""
    name = str(metadata.header.metadata.get("general.name", "")).lower()
    strips = any(part in name for part in _STRIPPING_NAMES)
    for kinds, is_special in (((Kind.CONTROL, Kind.UNKNOWN), True), ((Kind.USER_DEFINED,), False)):
        chosen = [token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in kinds]
        tokenizer.add_tokens(
            [
                AddedToken(token, special=is_special, normalized=False, rstrip=strips and token not in _NOT_STRIPPING)
                for token in chosen
            ]
        )


def _frame(metadata: Metadata, vocabulary: Vocabulary, *, begins: bool, ends: bool) -> TemplateProcessing:
    """Return the template that adds bos and eos if the file says so; ``begins`` and ``ends`` are the defaults."""
    first = _added_by_rule(metadata, vocabulary, "bos", begins)
    last = _added_by_rule(metadata, vocabulary, "eos", ends)
    single = [*first, "$A", *last]
    known = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys(first + last)]
    return TemplateProcessing(
        single=single, pair=[*single, *(f"{part}:1" for part in (*first, "$B", *last))], special_tokens=known
    )


def _added_by_rule(metadata: Metadata, vocabulary: Vocabulary, role: str, default: bool) -> list[str]:
    told = metadata.optional(f"tokenizer.ggml.add_{role}_token", bool, "true or false")
    if not (default if told is None else told):
        return []
    if role not in vocabulary.roles:
        if told is None:
            return []
        raise metadata.error(f"tokenizer.ggml.{role}_token_id", f"a token id, as add_{role}_token is true")
    return [vocabulary.tokens[vocabulary.roles[role]]]
