"""The rules that split text into words before merging, by their names in ``tokenizer.ggml.pre``.

Names and rules are those of llama.cpp (src/llama-vocab.cpp). Some of its patterns only approximate those of a model's
tokenizer.json, because its regular expressions have fewer features; there the tokenizer.json's patterns are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenizers import Regex
from tokenizers.normalizers import NFC, Normalizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split


@dataclass(frozen=True)
class Splitting:
    """A rule that splits text.

    Attributes:
        patterns: regular expressions, each applied to the pieces that the earlier ones left; matches and what lies
            between them become pieces.
        whole_words: whether a piece that is in the vocabulary is taken without merging.
        begins: whether a text begins with bos, for files that do not say.
        composes: whether text is normalized to Unicode's composed form (NFC).
        spelled: the spelling of tokens: "bytes" in GPT-2's alphabet, or "text" with a mark for spaces.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composes: bool = False
    spelled: str = "bytes"

    def pre_tokenizer(self) -> PreTokenizer:
        """Return the pre-tokenizer, which splits text and spells it in the vocabulary's alphabet."""
        splits: list[PreTokenizer] = [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        if self.spelled == "bytes":
            splits.append(ByteLevel(add_prefix_space=False, use_regex=False))
        return Sequence(splits)

    def normalizer(self) -> Normalizer | None:
        """Return the normalizer that runs before the split, or None."""
        return NFC() if self.composes else None


def _class(ranges: str) -> str:
    r"""Return the inside of a character class from code points in hexadecimal, such as "4E00-9FA5 3001"."""
    return "".join("-".join(rf"\x{{{point}}}" for point in part.split("-")) for part in ranges.split())


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_HAN = r"&&[^\p{Han}]]"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_LINES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_LINES}"


def _cased(upper: str, lower: str, end: str, digits: str, marks: str) -> str:
    """Return the pattern of gpt-4o and tekken, in which a capital letter starts a new word."""
    head = r"[^\r\n\p{L}\p{N}]?"
    return rf"{head}{upper}*{lower}+{end}|{head}{upper}+{lower}*{end}|{digits}|{marks}|{_LINES}"


_GPT4O = _cased(_UPPER, _LOWER, f"{_CONTRACTIONS}?", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*")
_CASED_LETTERS = _class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_HAN_HANGUL = f"[{_class('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
_HAN_KANA = f"[{_class('4E00-9FA5 3040-309F 30A0-30FF')}]+"
_ASIAN = _class(
    "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F "
    "AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
)
_ASCII_MARK_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_MARKED_WORD = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = rf"{_ASCII_MARK_WORD}|{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
_BLOOM = rf" ?[^(\s|.,!?{_class('2026 3002 FF0C 3001 964 6D4 60C')})]+"
_HALVED_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))

_DEFAULT = Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_OF_GPT2 = Splitting((_GPT2,))
_OF_STARCODER = Splitting((r"\p{N}", _GPT2))
_OF_LLAMA3 = Splitting((_LLAMA3,))
_OF_QWEN2 = Splitting((_QWEN2,))
_OF_GPT4O = Splitting((_GPT4O,))
_OF_DEEPSEEK3 = Splitting((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3))
_OF_BLOOM = Splitting((_BLOOM,))
_BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|{_SPACES}"
_TEXT = Splitting((r"[^\n]+|[\n]+",), spelled="text")

_GROUPS: tuple[tuple[str, Splitting], ...] = (
    ("default", _DEFAULT),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        replace(_OF_LLAMA3, whole_words=True, begins=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", _OF_LLAMA3),
    ("minicpm5", Splitting((r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_MARKS}|{_LINES}"), whole_words=True)),
    (
        "jais-2",
        Splitting((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|{_HALVED_SPACES}|\s{{1}}",)),
    ),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez", replace(_OF_QWEN2, composes=True)),
    ("stablelm2 hunyuan solar-open grok-2", _OF_QWEN2),
    (
        "qwen35",
        Splitting(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",
            ),
            composes=True,
        ),
    ),
    ("ufakzeka", Splitting((rf"{_WORD}|\p{{N}}|{_MARKS}|{_LINES}",))),
    ("laguna", Splitting((r"[^\n]+|[\n]+", _QWEN2))),
    (
        "seed-coder",
        Splitting((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)),
    ),
    ("bailingmoe bailingmoe2 llada-moe", Splitting((_BAILING,))),
    (
        "exaone-moe",
        Splitting(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
            )
        ),
    ),
    (
        "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
        "modern-bert mpt olmo jais trillion granite-docling exaone4",
        _OF_GPT2,
    ),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _OF_STARCODER),
    (
        "falcon",
        Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ),
    ("poro-chat bloom gpt3-finnish", _OF_BLOOM),
    ("viking", Splitting((_BLOOM, r"\p{N}"))),
    (
        "tekken",
        Splitting(
            (_cased(_UPPER, _LOWER, "", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),), whole_words=True, begins=True
        ),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _OF_GPT4O),
    ("granite-embed-multi-97m", replace(_OF_GPT4O, whole_words=True)),
    ("tiny_aya cohere2moe", Splitting((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("superbpe", Splitting((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        "kimi-k2",
        Splitting(
            (
                r"[\p{Han}]+|"
                + _cased(_UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN, f"{_CONTRACTIONS}?", r"\p{N}{1,3}", _MARKS),
            )
        ),
    ),
    (
        "deepseek-llm",
        Splitting(
            (
                r"[\r\n]",
                rf"\s?[{_CASED_LETTERS}]+",
                rf"\s?[!-/:-~{_class('FF01-FF0F FF1A-FF5E 2018-201F 3000-3002')}]+",
                r"\s+$",
                _HAN_HANGUL,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _OF_DEEPSEEK3),
    (
        "spark2_5",
        Splitting(
            (
                r"\p{N}{1,3}",
                _HAN_KANA,
                rf"{_ASCII_MARK_WORD}|{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
                r"\p{N}",
            )
        ),
    ),
    ("afmoe", Splitting((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", f"[{_ASIAN}]+", _DEEPSEEK3))),
    (
        "youtu",
        Splitting(
            (
                f"[{_class('AC00-D7A3 3131-318E')}]+"
                f"|[{_class('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F')}]+"
                f"|[{_class('3105-312F')}]+|{_HAN_KANA}",
                _cased(_UPPER, _LOWER, f"{_CONTRACTIONS}?", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
            ),
            whole_words=True,
        ),
    ),
    (
        "chameleon",
        Splitting(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            begins=True,
        ),
    ),
    ("gemma4 granite-embed-multi-311m", replace(_TEXT, begins=True)),
    ("sarvam-moe", _TEXT),
)
SPLITTINGS = {name: splitting for names, splitting in _GROUPS for name in names.split()}
