"""Convert text to token ids and back: tokenizer, chat template, streaming detokenization and stop strings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind, checked_list
from dynexport.runtime.bundle.errors import DynexportError, told_as
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.text_files import CONFIG_FILE, TEMPLATE_FILE, TEXT_FILES, TOKENIZER_FILE
from dynexport.runtime.text.chat_template import ChatTemplate, named_templates, special_tokens
from dynexport.runtime.text.token_bytes import token_bytes

# Replacements of transformers' clean_up_tokenization, in its order; a bundle's tokenizer.json contains them.
CLEAN_UPS = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}
# The end of a text that these replacements may still change once more text follows.
_MAY_BE_CLEANED = re.compile(r"[ '][ 'nvr]*$")
_REPLACEMENT = "\ufffd"
NO_VARIABLES: Mapping[str, Any] = {}


class Text:
    """The tokenizer and the chat template of a bundle.

    Both are optional: encoding without a tokenizer, or a chat without a template, raises an error.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, config: Mapping[str, Any], chat_template: ChatTemplate | None
    ) -> None:
        """Take parsed files; use ``of_bundle`` or ``from_files`` instead."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._special_tokens = special_tokens(config)
        self._special_ids: frozenset[int] = frozenset()
        self._known: set[int] = set()
        self.cleans_up = bool(config.get("clean_up_tokenization_spaces"))
        if tokenizer is not None:
            tokenizer.no_truncation()  # a stored limit would silently cut a long prompt
            tokenizer.no_padding()
            added = tokenizer.get_added_tokens_decoder().items()
            self._special_ids = frozenset(token_id for token_id, token in added if token.special)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Text:
        """Return a bundle's tokenizer and chat template. Methods raise DynexportError if the bundle has none."""
        return cls.from_files({name: bundle.read(name) for name in TEXT_FILES if name in bundle.manifest.files})

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Text:
        """Return a Text made from the contents of files.

        Args:
            files: any of ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``, by name;
                other names are ignored. Without the last, a template in tokenizer_config.json is used.

        Raises:
            DynexportError: when a file is corrupt.
        """
        checked_kind("files", files, Mapping, "contents by name")
        tokenizer = None
        if TOKENIZER_FILE in files:
            with told_as(f"{TOKENIZER_FILE}: cannot be loaded by the tokenizers library"):
                tokenizer = Tokenizer.from_str(files[TOKENIZER_FILE].decode("utf-8"))
        config = parse_json_object(files.get(CONFIG_FILE, b"{}"), CONFIG_FILE)
        templates = named_templates(config.get("chat_template"), CONFIG_FILE)
        if TEMPLATE_FILE in files:
            with told_as(f"{TEMPLATE_FILE}: expected UTF-8 text"):
                templates["default"] = files[TEMPLATE_FILE].decode("utf-8")
        return cls(tokenizer, config, ChatTemplate(templates) if templates else None)

    @property
    def has_tokenizer(self) -> bool:
        """True if the bundle has a tokenizer, which ``encode`` and ``decode`` need."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """True if the bundle has a chat template, which ``chat`` needs."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text; it is never truncated.

        Args:
            text: any string that UTF-8 can encode.
            add_special_tokens: whether to add the begin and end tokens that the tokenizer defines.

        Raises:
            DynexportError: without a tokenizer, or when the text is not UTF-8 or cannot be encoded.
        """
        tokenizer = self._require_tokenizer()
        _check_utf8(text)
        with told_as(f"{TOKENIZER_FILE}: cannot encode the text"):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; unknown ids are left out.

        Bytes that are not UTF-8 become U+FFFD.

        Raises:
            DynexportError: without a tokenizer, or when an id is negative or not a 32-bit integer.
        """
        tokenizer = self._require_tokenizer()
        try:
            text: str = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException:
            with told_as(f"{TOKENIZER_FILE}: cannot decode token ids"):
                raise
        return text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> list[int]:
        """Return the token ids of a conversation; arguments and errors as for ``ChatTemplate.render``.

        Raises:
            DynexportError: also when the bundle has no chat template or no tokenizer.
        """
        return self.encode(self.render(messages, add_generation_prompt, variables), add_special_tokens=False)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """Return the text of a conversation; arguments and errors as for ``chat``, without a need for a tokenizer."""
        return self._require_template().render(messages, add_generation_prompt, self._special_tokens, variables)

    def unused_variables(self, names: Collection[str]) -> list[str]:
        """Return the names that the chat template does not read. Raises DynexportError if it is missing or invalid."""
        return self._require_template().unused(names)

    def is_silent(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """Return whether ``decode`` always leaves this id out: it is unknown, or special and skipped.

        Raises:
            DynexportError: without a tokenizer, or when the id is negative or not a 32-bit integer.
        """
        tokenizer = self._require_tokenizer()
        if skip_special_tokens and token_id in self._special_ids:
            return True
        if token_id in self._known:  # most ids repeat, and the lookup is slower
            return False
        with told_as(f"{TOKENIZER_FILE}: cannot look up token id {token_id}"):
            found = tokenizer.id_to_token(token_id) is not None
        if found:
            self._known.add(token_id)
        return not found

    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each id adds to a text; see ``token_bytes``. Raises DynexportError as ``encode``."""
        with told_as(f"{TOKENIZER_FILE}: cannot decode token ids"):
            return token_bytes(self._require_tokenizer())

    def _require_template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise DynexportError(f"{TEMPLATE_FILE}: the bundle has no chat template; give a plain prompt instead")
        return self._chat_template

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise DynexportError(f"{TOKENIZER_FILE}: the bundle has no tokenizer; use token ids instead of text")
        return self._tokenizer


class StreamDecoder:
    """A streaming detokenizer: it returns text piece by piece, and a returned piece never changes.

    The pieces together equal ``text.decode`` of all ids. Bytes of an unfinished character are held back, and so are
    spaces that clean-up may still remove. Each push decodes a short window, whatever the stream's length.

    One exception: if a run of byte tokens is not UTF-8, ``decode`` of a byte-fallback tokenizer turns the whole run
    into U+FFFD, valid characters included. Characters that were complete before the invalid byte stay as returned here.
    """

    # An unfinished character has at most 3 bytes, so at most 3 tokens. The rest of the window is context, which
    # metaspace tokenizers need: they drop the leading space of the first token.
    _UNFINISHED = 3
    _CLEANED = 6  # characters that clean-up may still change
    _CONTEXT = 8
    _WINDOW = 3 * _CONTEXT  # reached only by invalid bytes, and by text that clean-up may change without end

    def __init__(self, text: Text, *, skip_special_tokens: bool = True) -> None:
        """Start a stream; one decoder serves one sequence."""
        checked_kind("text", text, Text, "a Text")
        self._text = text
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._decoded = ""  # of the window
        self._emitted = 0  # characters of it
        self._waiting = 0  # tokens since the window last ended in a whole character
        self._boundary = 0  # where the window will begin after it slides: between two characters

    def push(self, token_id: int) -> str:
        """Take one more id; return the text that is now final, often one word, or the empty string.

        Raises:
            DynexportError: as ``Text.decode``.
        """
        if self._text.is_silent(token_id, skip_special_tokens=self._skip_special_tokens):
            return ""
        self._window.append(token_id)
        self._decoded = self._decode_window()
        piece = self._decoded[self._emitted : self._final_length()]
        self._emitted += len(piece)
        self._slide()
        return piece

    def finish(self) -> str:
        """Return the text still held back, with U+FFFD for the bytes of an unfinished character."""
        piece = self._decoded[self._emitted :]
        self._emitted += len(piece)
        return piece

    def _final_length(self) -> int:
        """Return the number of characters of the window that later tokens cannot change."""
        whole = len(self._decoded.rstrip(_REPLACEMENT))
        self._waiting = 0 if whole == len(self._decoded) else self._waiting + 1
        # After 3 more tokens the bytes are known to be invalid; only the last can still begin a character.
        final = whole if self._waiting <= self._UNFINISHED else len(self._decoded) - 1
        return final - self._uncleaned(final) if self._text.cleans_up else final

    def _uncleaned(self, length: int) -> int:
        """Return the number of characters before ``length`` that clean-up may change once more text follows."""
        ends = _MAY_BE_CLEANED.search(self._decoded[max(0, length - self._CLEANED) : length])
        return 0 if ends is None else len(ends[0])

    def _slide(self) -> None:
        if self._emitted == len(self._decoded) and len(self._window) - self._boundary >= self._CONTEXT:
            start = self._boundary
        elif len(self._window) > self._WINDOW:
            start = len(self._window) - 2 * self._CONTEXT
        else:
            return
        held_back = max(0, len(self._decoded) - self._emitted)
        del self._window[:start]
        self._decoded = self._decode_window()
        self._emitted = len(self._decoded) - held_back
        self._boundary = len(self._window)

    def _decode_window(self) -> str:
        return self._text.decode(self._window, skip_special_tokens=self._skip_special_tokens)


class StopStrings:
    """A filter that ends streamed text before the first stop string, however the text is split into pieces.

    The first stop string is the one that is complete first; of several that end together, the longest.

    Attributes:
        found: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for any of ``stops``; without stop strings, all text passes.

        Raises:
            DynexportError: when a stop string is empty.
        """
        stops = checked_list("stop", stops, "strings")
        for stop in stops:
            checked_kind("stop", stop, str, "a list of strings")
        if "" in stops:
            raise DynexportError("stop: expected non-empty strings, found an empty one")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece; return the text that cannot belong to a stop string, and whether a stop string was found.

        After a stop string was found, every push returns ``("", True)``.
        """
        if self.found is not None:
            return "", True
        self._held += text
        starts = ((self._held.find(stop), stop) for stop in self._stops)
        if found := [(start + len(stop), start, stop) for start, stop in starts if start >= 0]:
            _, start, self.found = min(found)
            return self._release(start, drop_rest=True), True
        return self._release(len(self._held) - self._undecided()), False

    def finish(self) -> str:
        """Return the text held back as a possible start of a stop string; it is empty if one was found."""
        return self._release(len(self._held))

    def _undecided(self) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1)
        for length in range(min(len(self._held), longest - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int, *, drop_rest: bool = False) -> str:
        piece = self._held[:length]
        self._held = "" if drop_rest else self._held[length:]
        return piece


def _check_utf8(text: str) -> None:
    """Raise DynexportError for lone surrogates, which Python uses for bytes that are not UTF-8."""
    checked_kind("text", text, str, "text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DynexportError(
            f"text: expected UTF-8, found {text[error.start]!a} after {error.start} characters, which is no character"
        ) from error
