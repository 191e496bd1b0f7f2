"""Tokenizers of GGUF files: ids are those of llama.cpp, whose rules are spelled out here once more, and slowly."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from dynexport.exporter.checkpoint.gguf_header import GgufHeader
from dynexport.exporter.checkpoint.gguf_metadata import Metadata
from dynexport.exporter.checkpoint.gguf_pre_tokenizers import SPLITTINGS
from dynexport.exporter.checkpoint.gguf_sampling import read_sampling
from dynexport.exporter.checkpoint.gguf_tokenizer import tokenizer_files
from dynexport.exporter.checkpoint.tokenizer_files import TokenizerFiles
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.text.text import StreamDecoder, Text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MARK = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def files_of(*, name: str = "", template: Any = None, **keys: Any) -> TokenizerFiles:
    """The files that metadata makes, given without the prefix ``tokenizer.ggml.``."""
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    metadata |= {"general.name": name} if name else {}
    metadata |= {"tokenizer.chat_template": template} if template else {}
    return tokenizer_files(Metadata(GgufHeader(Path("model.gguf"), metadata, {})), build=True)


def tokenizer_of(**keys: Any) -> Tokenizer:
    return Tokenizer.from_buffer(files_of(**keys).files["tokenizer.json"])


def refusal(**keys: Any) -> str:
    with pytest.raises(DynexportError) as caught:
        files_of(**keys)
    return str(caught.value)


# SentencePiece vocabularies: <unk>, <s>, </s>, bytes, then pieces with scores.
PIECES = [MARK, *"abcé", "ab", "bc", "abc", f"{MARK}a", f"{MARK}ab", "cab", MARK * 2, f"{MARK}{MARK}a", f"c{MARK}"]
SPM = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<|user|>", "<tool>", "  "]
SPM_KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), CONTROL, USER_DEFINED, USER_DEFINED]
SPM_SCORES = [0.0] * 259 + [-float(7 * i % 17) for i in range(len(PIECES))] + [0.0] * 3


def spm(**changes: Any) -> dict[str, Any]:
    return {"model": "llama", "tokens": SPM, "token_type": SPM_KINDS, "scores": SPM_SCORES} | changes


def merge_like_sentencepiece(text: str) -> list[str]:
    """Of all neighbours that make a piece, the best score first, and of equal ones the leftmost."""
    symbols = list(text)
    while True:
        found = [
            (-SPM_SCORES[SPM.index(left + right)], i)
            for i, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in SPM
        ]
        if not found:
            break
        _, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [piece for symbol in symbols for piece in ([symbol] if symbol in SPM else bytes_of(symbol))]


def bytes_of(text: str) -> list[str]:
    return [BYTES[byte] for byte in text.encode()]


def encode_like_llama_cpp(text: str, *, prefix: bool, bos: bool) -> list[str]:
    """A space before the first text and before text after a special token, where the file wants one."""
    special = [token for token, kind in zip(SPM, SPM_KINDS, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    pattern = "(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")"
    tokens = ["<s>"] if bos else []
    for part in regex.split(pattern, text):
        if part in special:
            tokens.append(part)
        elif part:
            tokens += merge_like_sentencepiece(((" " if prefix else "") + part).replace(" ", MARK))
    return tokens


class TestSentencePiece:
    TOKENIZERS = {
        (prefix, bos): tokenizer_of(**spm(add_space_prefix=prefix, add_bos_token=bos))
        for prefix in (True, False, None)
        for bos in (True, False, None)
    }

    @given(
        st.lists(
            st.sampled_from(["a", "b", "c", "é", "ab", "🙂", " ", "  ", "\n", "</s>", "<unk>", "<|user|>", "<tool>"])
        ),
        st.sampled_from([True, False, None]),
        st.sampled_from([True, False, None]),
    )
    def test_ids_are_those_of_llama_cpp(self, parts: list[str], prefix: bool | None, bos: bool | None) -> None:
        text = "".join(parts)
        tokenizer = self.TOKENIZERS[prefix, bos]
        expected = encode_like_llama_cpp(text, prefix=prefix is not False, bos=bos is not False)
        assert tokenizer.encode(text).tokens == expected

    @given(st.lists(st.sampled_from(["a", "b", "c", "é", "🙂", " ", "\n", "x"])))
    def test_decoding_gives_the_text_back_as_a_whole_and_in_pieces(self, parts: list[str]) -> None:
        written = "a".join(["", *parts])  # a space in front of a token that is spaces is lost, in llama.cpp too
        for prefix in (True, False):
            tokenizer = self.TOKENIZERS[prefix, True]
            text = Text.from_files({"tokenizer.json": tokenizer.to_str().encode()})
            ids, stream = text.encode(written), StreamDecoder(text)
            assert text.decode(ids) == written
            assert "".join(stream.push(token_id) for token_id in ids) + stream.finish() == written

    def test_control_tokens_are_hidden_and_user_defined_ones_shown(self) -> None:
        text = Text.from_files(files_of(**spm()).files)
        assert text.decode(text.encode("<|user|>a<tool>")) == "a<tool>"

    def test_spaces_after_special_tokens_of_phi_3_belong_to_them(self) -> None:
        for name, strips in (("Phi-3 mini", True), ("phi3", True), ("Llama", False)):
            tokenizer = tokenizer_of(**spm(), name=name)
            assert tokenizer.encode("<|user|>\n a").tokens[2:] == (
                [f"{MARK}a"] if strips else [MARK, "<0x0A>", f"{MARK}a"]
            )
            assert tokenizer.encode("<s> a").tokens[2:] == [f"{MARK}{MARK}a"]

    def test_scores_are_needed_to_merge_by_them(self) -> None:
        assert "tokenizer.ggml.scores" in refusal(**spm(scores=[0.0]))
        assert "tokenizer.ggml.scores" in refusal(**spm(scores=[math.nan, *SPM_SCORES[1:]]))
        assert "256 characters" in refusal(
            **spm(tokens=[*SPM, "a" * 300], token_type=[*SPM_KINDS, 1], scores=[*SPM_SCORES, 0.0])
        )


# Unigram vocabularies.
UNIGRAM = {
    "<pad>": 0.0,
    "</s>": 0.0,
    "<unk>": 0.0,
    MARK: -3.0,
    f"{MARK}a": -1.0,
    f"{MARK}ab": -4.0,
    "b": -2.0,
    "c": -2.5,
    "bc": -9.0,
}


def unigram(**changes: Any) -> dict[str, Any]:
    kinds = [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * (len(UNIGRAM) - 3)
    return {"model": "t5", "tokens": list(UNIGRAM), "scores": list(UNIGRAM.values()), "token_type": kinds} | changes


def test_unigram() -> None:
    tokenizer = tokenizer_of(**unigram(add_space_prefix=True))
    assert tokenizer.encode("ab c").tokens == [f"{MARK}a", "b", MARK, "c", "</s>"]
    assert tokenizer.encode("  ab").tokens == [MARK, MARK, f"{MARK}a", "b", "</s>"]
    assert tokenizer.encode("aqqb").ids == [4, 2, 6, 1]  # one <unk> for a run of unknown characters
    tokenizer = tokenizer_of(**unigram(remove_extra_whitespaces=True, add_eos_token=False))
    assert tokenizer.encode("  ab   c ").tokens == [f"{MARK}a", "b", MARK, "c"]
    assert tokenizer.decode(tokenizer.encode("ab c").ids) == "ab c"
    assert "Unigram" in refusal(**unigram(precompiled_charsmap=[255, 255, 255, 127]))


# Byte-level vocabularies.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(*added: tuple[str, int], **changes: Any) -> dict[str, Any]:
    tokens = [*ALPHABET, "Ġa", "12", *(token for token, _ in added)]
    kinds = [NORMAL] * (len(ALPHABET) + 2) + [kind for _, kind in added]
    merges = ["Ġ a", "1 2"]
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": merges} | changes


CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + END
)
KANA, HANGUL = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# llama.cpp's own expressions, where they say the same as those of the models' tokenizer.json.
LLAMA_CPP = {
    "llama3": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END],
    "qwen2": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END],
    "gpt-2": [GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "viking": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", KANA, DEEPSEEK3],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HANGUL, r"\p{N}"],
    "superbpe": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
    "exaone-moe": [
        CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
        r"|\s+(?!\S)|\s+"
    ],
    "laguna": [r"[^\n]+|[\n]+", CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END],
}
ATOMS = [
    *"aBéΩ你好ひカ한1½'s.!…\uff0c—$`|_/🙂<\u3000\t\n",
    "4567",
    "  ",
    "\r\n",
    "'S",
    "'ll",
    "e\u0301",
    "\u0928\u093f",
]


def words_like_llama_cpp(patterns: list[str], text: str) -> list[str]:
    """Each expression cuts what the earlier ones left: matches and what lies between them."""
    parts = [text]
    for pattern in patterns:
        cut: list[str] = []
        for part in parts:
            end = 0
            for match in regex.finditer(pattern, part):
                cut += [part[end : match.start()], match.group()]
                end = match.end()
            cut.append(part[end:])
        parts = [part for part in cut if part]
    return parts


class TestSplitting:
    @given(st.sampled_from(sorted(LLAMA_CPP)), st.lists(st.sampled_from(ATOMS), max_size=12))
    def test_words_are_those_of_llama_cpp(self, name: str, atoms: list[str]) -> None:
        text = "".join(atoms)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITTINGS[name].patterns]
        words = [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]
        assert words == words_like_llama_cpp(LLAMA_CPP[name], text)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ("tekken", ["camel", "Case", "ÉTÉWord", " it", "'s", " ", "1", "2", "3", "!/", " ", " x", "\n"]),
            ("gpt-4o llama4 minimax-m2", ["camel", "Case", "ÉTÉWord"]),
            ("kimi-k2", ["camel", "Case", "你好"]),
            ("afmoe", ["1", "234", "567"]),
            ("tiny_aya", ["1", "234", "567"]),
            ("youtu", ["한국", "你好", "\uff0c"]),
            ("deepseek-llm", ["Gr", "öß", "e", "你好", "\uff0c", "한국"]),
            ("jais-2", ["a", "    ", "  ", " b"]),
        ],
    )
    def test_words_of_other_names(self, names: str, words: list[str]) -> None:
        for name in names.split():
            splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITTINGS[name].patterns]
            assert [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str("".join(words))] == words

    def test_every_name_of_llama_cpp_makes_a_tokenizer_that_gives_text_back(self) -> None:
        written = "It's 12345 o'clock!\r\n\n  naïve 你好\tx = f(a_b) 🎉"
        assert len(SPLITTINGS) == 89
        for name, splitting in SPLITTINGS.items():
            if splitting.spelled == "text":
                continue
            tokenizer = tokenizer_of(**byte_level(pre=name))
            assert tokenizer.decode(tokenizer.encode(written).ids) == written, name

    def test_names_that_are_not_known_are_refused(self) -> None:
        message = refusal(**byte_level(pre="jurassic"))
        assert "tokenizer.ggml.pre" in message and "'jurassic'" in message and "--tokenizer" in message

    def test_no_name_is_the_default_and_told(self) -> None:
        files = files_of(**byte_level(pre=None))
        assert any("tokenizer.ggml.pre" in note for note in files.notes)
        assert files.files["tokenizer.json"] == files_of(**byte_level(pre="default")).files["tokenizer.json"]

    @pytest.mark.parametrize(
        ("name", "begins"),
        [("llama-bpe", True), ("tekken", True), ("chameleon", True), ("gpt-2", False), ("dbrx", False)],
    )
    def test_bos_where_the_file_does_not_say(self, name: str, begins: bool) -> None:
        keys = byte_level(("<s>", CONTROL), pre=name, bos_token_id=len(ALPHABET) + 2)
        assert tokenizer_of(**keys).encode("x").tokens == ["<s>"] * begins + ["x"]
        for told in (True, False):
            assert tokenizer_of(**keys, add_bos_token=told).encode("x").tokens == ["<s>"] * told + ["x"]
        assert "bos_token_id" in refusal(**byte_level(pre=name, add_bos_token=True))

    def test_words_of_the_vocabulary_are_taken_whole_where_the_name_says_so(self) -> None:
        for name, whole in (("llama-bpe", True), ("dbrx", False)):
            keys = byte_level(("xyz", NORMAL), pre=name)
            assert tokenizer_of(**keys).encode("xyz").tokens == (["xyz"] if whole else ["x", "y", "z"])


def test_merged_text_of_gemma4() -> None:
    tokens = ["<unk>", "<bos>", *BYTES, MARK, "a", "b", f"{MARK}a", "ab"]
    kinds = [UNKNOWN, CONTROL, *[BYTE] * 256, *[NORMAL] * 5]
    keys = {
        "tokens": tokens,
        "token_type": kinds,
        "merges": [f"{MARK} a", "a b"],
        "bos_token_id": 1,
        "unknown_token_id": 0,
    }
    for model, pre in (("gemma4", None), ("gpt2", "gemma4")):
        tokenizer = tokenizer_of(model=model, pre=pre, **keys)
        assert tokenizer.encode("ab a\né").tokens == ["<bos>", "ab", f"{MARK}a", "<0x0A>", "<0xC3>", "<0xA9>"]
        assert tokenizer.decode(tokenizer.encode(" ab a\né").ids) == " ab a\né"


class TestSpecialTokens:
    def test_ends_are_found_by_their_text(self) -> None:
        first = len(ALPHABET) + 2
        names = ["<|im_end|>", "<|eot_id|>", "</s>", "<|fim_pad|>", "<x>"]
        added = zip(names, [CONTROL, NORMAL, NORMAL, NORMAL, CONTROL], strict=True)
        files = files_of(**byte_level(*added, eos_token_id=first + 4)).files
        ends = [first + 4, first + 3, first + 2, first + 1, first]
        generation = json.loads(files["generation_config.json"])
        assert generation["eos_token_id"][:2] == ends[:2] and sorted(generation["eos_token_id"]) == sorted(ends)
        text = Text.from_files(files)
        for i, name in enumerate(names):
            assert text.encode(f"x{name}x") == [*text.encode("x"), first + i, *text.encode("x")]
            assert text.decode(text.encode(f"x{name}x")) == "xx"

    def test_ends_that_only_close_a_part_of_an_answer(self) -> None:
        first = len(ALPHABET) + 2
        added = [(text, CONTROL) for text in ("<|return|>", "<|call|>", "<|end|>", "<|channel|>")]
        files = files_of(**byte_level(*added)).files
        assert json.loads(files["generation_config.json"])["eos_token_id"] == [first, first + 1]
        text = Text.from_files(files)
        assert text.decode(text.encode("<|channel|>x<|end|>y<|return|>")) == "<|channel|>x<|end|>y"

    def test_roles_that_name_no_token(self) -> None:
        assert "eos_token_id" in refusal(**byte_level(eos_token_id=9999))
        files = files_of(**byte_level(eos_token_id=2**32 - 1)).files  # -1, for none
        assert json.loads(files["generation_config.json"]) == {}

    def test_an_empty_token_has_the_name_that_llama_cpp_gives_it(self) -> None:
        assert tokenizer_of(**byte_level(("", NORMAL))).token_to_id(f"[EMPTY_{len(ALPHABET) + 2}]") == len(ALPHABET) + 2


@pytest.mark.parametrize("model", ["bert", "rwkv", "plamo2", "hybriddna", "whitespace", "other"])
def test_other_models_are_refused_by_name(model: str) -> None:
    message = refusal(**byte_level(model=model))
    assert f"'{model}'" in message and "tokenizer.ggml.model" in message and "--tokenizer" in message


def test_no_vocabulary_is_no_tokenizer() -> None:
    for model in (None, "none", "no_vocab"):
        assert set(files_of(model=model).files) == {"generation_config.json"}


def test_what_is_left_out_is_told() -> None:
    files = files_of(**byte_level(suppress_tokens=[1], future_flag=True, token_type_count=2), template="{{ messages }}")
    (note,) = files.notes
    assert "tokenizer.ggml.suppress_tokens" in note and "tokenizer.ggml.future_flag" in note and "count" not in note
    assert files.files["chat_template.jinja"] == b"{{ messages }}"
    metadata = {"tokenizer.chat_template.tool_use": "{{ tools }}"}
    (note,) = tokenizer_files(Metadata(GgufHeader(Path("m.gguf"), metadata, {})), build=True).notes
    assert "tool_use" in note


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_type": [1]}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["ab"]}, "merges"),
        ({"merges": ["xx yy"]}, "merges"),
        ({"tokens": ["a", "a"]}, "tokens"),
        ({"tokens": ["a", 1]}, "tokens"),
        ({"model": 3}, "model"),
        ({"model": "gpt2", "tokens": None}, "tokens"),
    ],
)
def test_damaged_vocabularies(changes: dict[str, Any], named: str) -> None:
    assert f"tokenizer.ggml.{named}" in refusal(**byte_level(**changes))


def sampling_of(**keys: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    metadata = {f"general.sampling.{key}": value for key, value in keys.items()}
    return read_sampling(Metadata(GgufHeader(Path("m.gguf"), metadata, {})))


def test_recommended_sampling() -> None:
    assert sampling_of() == ({}, ())
    fields: dict[str, Any] = {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25, "do_sample": True}
    assert sampling_of(temp=0.5, top_k=20, penalty_repeat=1.25, penalty_last_n=-1, mirostat=0) == (fields, ())
    assert sampling_of(temp=0.0, top_p=0.5) == ({"top_p": 0.5, "do_sample": False}, ())
    fields, (note,) = sampling_of(sequence="kp", xtc_probability=0.5, xtc_threshold=0.1)
    assert fields == {} and "sequence 'kp', xtc_probability 0.5" in note
    with pytest.raises(DynexportError, match=r"general.sampling.temp: expected a finite number >= 0, found -1"):
        sampling_of(temp=-1.0)
