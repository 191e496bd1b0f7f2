"""Tokenizers with the pipelines of the supported families, trained on a little text in seconds.

Another implementation gets a family's pipeline wrong (normalizer, expressions, options of BPE, decoder, added tokens),
not its vocabulary.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dynexport.exporter.bundle.check_strings import PHRASES
from dynexport.exporter.checkpoint.gguf_pre_tokenizers import SPLITTINGS
from dynexport.runtime.text.text import CLEAN_UPS

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MARK = "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_BLOOM = r""" ?[^(\s|[.,!?…。，、।۔،])]+"""  # noqa: RUF001 - BLOOM's
_TEXT = [*PHRASES * 3, " ".join(PHRASES)]
_DECODING = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def _expressions(name: str) -> pre_tokenizers.PreTokenizer:
    return SPLITTINGS[name].pre_tokenizer()


def _byte_level(name: str) -> Tokenizer:
    """A byte-level pipeline with a vocabulary of its own."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    falcon = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            plain,
            pre_tokenizers.Digits(),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    bloom = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BLOOM), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipelines: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "gpt2": (None, plain, {}),
        "neox": (normalizers.NFC(), plain, {}),
        "opt": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        "smollm2": (None, digits, {}),
        "llama3": (None, _expressions("llama3"), {"ignore_merges": True}),
        "qwen2": (normalizers.NFC(), _expressions("qwen2"), {}),
        "tekken": (None, _expressions("tekken"), {"ignore_merges": True}),
        "bloom": (None, bloom, {}),
        "falcon": (None, falcon, {}),
        "compatible": (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), plain, {}),
    }
    normalizer, pre_tokenizer, options = pipelines[name]
    tokenizer = Tokenizer(models.BPE(**options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


@cache
def _pieces() -> str:
    """Return the tokenizer.json of a SentencePiece-like vocabulary with byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *_BYTES]
    tokenizer.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in _BYTES]
    return json.dumps(state)


def _with_bytes(name: str) -> Tokenizer:
    """A pipeline with marks for spaces and byte fallback, as converted from SentencePiece."""
    tokenizer = Tokenizer.from_str(_pieces())
    if name in ("llama2", "phi3"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
        tokenizer.decoder = decoders.Sequence(_DECODING)
    elif name == "mistral":
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(_DECODING)
    elif name == "gemma2":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(_DECODING[:3])
    else:
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="always", split=True)
        tokenizer.decoder = decoders.Metaspace(MARK, prepend_scheme="always", split=True)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", begin)]
    )
    return tokenizer


WITH_BYTES = ("llama2", "mistral", "gemma2", "phi3", "metaspace")
BYTE_LEVEL = ("gpt2", "neox", "opt", "smollm2", "llama3", "qwen2", "tekken", "bloom", "falcon", "compatible")


@cache
def family_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a pipeline, with added tokens of the kinds that the family has."""
    tokenizer = _with_bytes(name) if name in WITH_BYTES else _byte_level(name)
    strips = name == "phi3"  # Phi-3's tokens take the spaces that follow them
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=strips) for token in SPECIAL])
    if name in ("neox", "gemma2"):  # runs of spaces and line feeds are tokens there
        tokenizer.add_tokens([AddedToken(" " * count, normalized=name == "neox") for count in (2, 4, 8)])
        tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (2, 3)])
    if name == "compatible":  # every flag, though no family has all
        tokenizer.add_tokens(
            [
                AddedToken("king", single_word=True),
                AddedToken("The", normalized=True, lstrip=True),
                AddedToken("[MASK]", lstrip=True, special=True),
                AddedToken("ﬁ", normalized=False, lstrip=True, rstrip=True),
            ]
        )
    if name == "llama3":
        begin = tokenizer.token_to_id(SPECIAL[2])
        template = processors.TemplateProcessing(
            single=f"{SPECIAL[2]} $A", pair=None, special_tokens=[(SPECIAL[2], begin)]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    if name == "opt":
        end = tokenizer.token_to_id(SPECIAL[1])
        tokenizer.post_processor = processors.RobertaProcessing((SPECIAL[1], end), (SPECIAL[2], end + 1))
    if name == "metaspace":
        clean_up = [decoders.Replace(before, after) for before, after in CLEAN_UPS.items()]
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *clean_up])
    return tokenizer


def gguf_tokenizer(name: str) -> Tokenizer:
    """Return a byte-level tokenizer that splits as ``tokenizer.ggml.pre`` says."""
    tokenizer = Tokenizer.from_str(family_tokenizer("gpt2").to_str())
    splitting = SPLITTINGS[name]
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    return tokenizer
