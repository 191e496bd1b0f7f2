"""Strings that are hard to tokenize, by which the runtimes of a bundle check their tokenizers."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

# What tokenizers get wrong: scripts, marks, emoji, controls, spaces, code, contractions.
PHRASES = (
    "Once upon a time there was a king who had three sons.",
    "It's what we'd've said, don't you'll see; I'M HE'S they're",
    "Der Fuchs läuft über die Straße; Größe, Äpfel, Übung.",
    "Où est la bibliothèque ? L'été, ça va très bien.",
    "¿Dónde está el niño? Mañana será otro día.",
    "Привет, как дела? Сегодня хорошая погода.",
    "Καλημέρα κόσμε, τι κάνεις;",
    "今天天气很好,我们去公园吧。",
    "東京は日本の首都です。カタカナとひらがな。",
    "안녕하세요 세계, 한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ ٠١٢٣",
    "שלום עולם, מה נשמע?",
    "नमस्ते दुनिया। यह हिन्दी है। १२३",
    "สวัสดีชาวโลก ภาษาไทย",
    "Xin chào thế giới, tiếng Việt có dấu.",
    "გამარჯობა მსოფლიო; Բարեւ աշխարհ; ሰላም ልዑል",
    "ཨོཾ་མ་ཎི་པདྨེ་ཧཱུྃ",
    "def f(x):\n\treturn x ** 2  # comment\n\n\nif __name__ == '__main__':\n    print(f(3))\n",
    '<html><body class="a">&amp; text</body></html>',
    "SELECT * FROM t WHERE a>=1 AND b!='x';",
    "a=1;b=22;c=333;d=4444;e=55555;pi=3.14159265358979",
    "1234567890 12 345 6789 ½ ⅓ ² ٣ 五 Ⅻ",
    "👋🏽 family 👨\u200d👩\u200d👧\u200d👦 flag 🇩🇪 heart ❤️ 🤷🏾\u200d♀️",
    "e\u0301 vs é, A\u030a vs Å, \u1e9b\u0323, \ufb01 ligature, \u2167, \u2460",
    "zero\u200bwidth, nbsp\u00a0here, thin\u2009space, ideographic\u3000space",
    "tabs\t\ttabs\n\nnew lines\r\n\r\ncr\rcr",
    "   leading and trailing   ",
    "a  b   c    d     e",
    " ",
    "  ",
    "\n",
    "\n\n \n",
    "\t \t",
    "",
    ".",
    "'",
    "''",
    "'S 'T 'LL 'tis",
    "https://example.org/path?q=1&r=%20#frag",
    "user@example.org",
    "CamelCaseAndSNAKE_case-kebab",
    "ǅ ǈ ʰ ª º ß ẞ İ \u0131 \u017f",
    "\u2028line sep\u2029para sep\x85nel",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f",
    "\ufeffbom",
    "\ufffd replacement",
    "\U000e0001 tag",
    "\u0300\u0301 lone marks",
    "x\u0315\u0300\u05ae\u0062",
    "naïve café résumé coöperate",
    "\u1100\u1161\u11a8 jamo",
    "…\u2014\u2013“quoted”\u2018single\u2019",
    "(a|b)[c]{d}<e>",
    "<0x41><0xE2> not bytes",
    "\u2581 the mark for spaces \u2581\u2581",
    "!!??..,,;;::",
    "$100.00 €50 £20 ¥1000 ₹5",
    "∑∫√∞≈≠ αβγ → ⇒",
    "a" * 70,
    "ab" * 40,
    "the " * 30,
)
_SEPARATORS = ("", " ", "\n", "  ")
_SPACED = " \t\n\r\u00a0\u3000aB1é.,'-"
_MIXED, _RANDOM, _SPACES = 60, 100, 80
_TOKENS = 6  # of each end of the list of added tokens


def check_strings(added: Sequence[str]) -> list[str]:
    """Return a few hundred strings, always the same ones for the same added tokens.

    Args:
        added: the texts of the tokenizer's added tokens; some of them are put among other text.
    """
    draw = random.Random(14)

    def one(choices: Sequence[str]) -> str:
        return choices[int(draw.random() * len(choices))]  # unlike choice(), the same in every version of Python

    letters = _characters()
    mixed = [one(_SEPARATORS).join(one(PHRASES) for _ in range(3)) for _ in range(_MIXED)]
    anything = ["".join(one(letters) for _ in range(1 + int(draw.random() * 24))) for _ in range(_RANDOM)]
    spaced = ["".join(one(_SPACED) for _ in range(1 + int(draw.random() * 30))) for _ in range(_SPACES)]
    return list(dict.fromkeys([*PHRASES, *mixed, *anything, *spaced, *_with_tokens(added)]))


def _with_tokens(added: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys([*added[:_TOKENS], *added[-_TOKENS:]]))
    texts = []
    for index, token in enumerate(chosen):
        other, phrase = chosen[(index + 1) % len(chosen)], PHRASES[index]
        texts += [
            token,
            f" {token} ",
            f"a{token}b",
            f"{phrase}\n{token}\n {phrase}",
            f"{token}{other}{token} {other}",
            f"<{token}>  {token[:-1]}",
            f"{token}user\n{phrase}{other}\n{token}assistant\n",
        ]
    return texts


def _characters() -> str:
    """Return the characters of Unicode 3.2, which every version of Python and of other libraries knows."""
    database = unicodedata.ucd_3_2_0
    return "".join(
        character for character in map(chr, range(0x110000)) if database.category(character) not in ("Cs", "Cn", "Co")
    )


__all__ = ["PHRASES", "check_strings"]
