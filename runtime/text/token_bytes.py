"""Find the bytes that each token adds to a text, for tools that match text token by token."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that each token id adds to a text that has begun; empty for special and unused ids.

    Each token is decoded after a letter, because decoders drop the leading space of a text's first token. A token that
    is not whole characters is a byte token ("<0x0A>"), or is written in the byte alphabet of GPT-2.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    letter = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    before = tokenizer.decode(letter)
    texts = tokenizer.decode_batch([[*letter, token] for token in range(max(vocabulary.values(), default=-1) + 1)])
    added = [text[len(before) :] if text.startswith(before) else "" for text in texts]
    return [
        _raw(tokenizer.id_to_token(token) or "") if _REPLACEMENT in text else text.encode()
        for token, text in enumerate(added)
    ]


def _raw(written: str) -> bytes:
    """Return the bytes of a token that is not whole characters, from the way the vocabulary writes it."""
    if (byte := _BYTE.fullmatch(written)) is not None:
        return bytes([int(byte[1], 16)])
    return bytes(_ALPHABET[c] for c in written) if all(c in _ALPHABET for c in written) else b""


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet (openai/gpt-2, src/encoder.py, ``bytes_to_unicode``)."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()

__all__ = ["token_bytes"]
