"""The tokenizer of a Hugging Face directory, read into one tokenizer.json that includes its side files."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from dynexport.exporter.checkpoint.added_tokens import added_tokens, extra_tokens, notes_beyond, notes_on_ids
from dynexport.exporter.checkpoint.end_tokens import ends_by_text
from dynexport.exporter.checkpoint.small_files import ANOTHER_TOKENIZER, find_file, parse_object, read_file
from dynexport.runtime.bundle.errors import DynexportError, told_as
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.text_files import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from dynexport.runtime.text.chat_template import named_templates
from dynexport.runtime.text.text import CLEAN_UPS

_SIDE_FILES = ("config.json", CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = (
    TOKENIZER_FILE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
_VERSIONED = re.compile(r"tokenizer\.[0-9.]{1,20}\.json")
_TEMPLATES = "additional_chat_templates"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_OF_A_TOKEN = ("content", "__type", *_FLAGS)
# The fields of config.json that AutoTokenizer reads; faults in other fields are reported elsewhere.
_MODEL_FIELDS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_CLEANS_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_PROBE = "Hello world, it's 12345 o'clock!\n\n  x = f(a_b)\t你好 é 🙂"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a bundle.

    Attributes:
        files: name -> content of the files that exist: ``tokenizer.json`` alone determines the ids of a text,
            ``tokenizer_config.json`` names the special tokens, ``chat_template.jinja`` is the chat template.
        notes: differences between this tokenizer and the checkpoint's files, one line each.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_tokenizer(directory: Path, *, build: bool = True) -> TokenizerFiles:
    """Read a directory's tokenizer; it gives the ids of transformers' ``AutoTokenizer``.

    transformers builds it if it is installed. Otherwise tokenizer.json is used unchanged, and side files with tokens or
    flags that it does not have are refused.

    Args:
        directory: a directory with any of tokenizer.json, vocab.json and merges.txt, tokenizer.model, their side files
            and chat templates.
        build: whether to build the tokenizer; False if the user names another.

    Raises:
        DynexportError: when a file is damaged, or no tokenizer can be built from the files.
    """
    sides = {name: read_file(path) for name in (*_VOCABULARIES, *_SIDE_FILES) if (path := find_file(directory, name))}
    settings = _parse(directory, sides, CONFIG_FILE)
    versions = settings.get("fast_tokenizer_files")  # for older versions of transformers
    for name in versions if isinstance(versions, list) else ():
        if _VERSIONED.fullmatch(str(name)) and (path := find_file(directory, name)):
            sides[name] = read_file(path)
    templates = _read_templates(directory, settings)
    notes = notes_on_templates(templates)
    named = _named_tokens(directory, settings, sides)
    files = {TEMPLATE_FILE: templates["default"].encode()} if "default" in templates else {}
    cleans_up = False
    if build and any(name in sides for name in _VOCABULARIES):
        if importlib.util.find_spec("transformers") is None:
            tokenizer, told = _as_it_stands(directory, sides, settings, named)
        else:
            tokenizer, named, cleans_up, told = _built(directory, sides, settings)
        notes += told + notes_beyond(tokenizer, directory, sides)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        files[TOKENIZER_FILE] = tokenizer.to_str().encode()
    if named or CONFIG_FILE in sides or templates.keys() - {"default"}:
        files[CONFIG_FILE] = tokenizer_settings(named, templates, cleans_up=cleans_up)
    return TokenizerFiles(files, notes)


def tokenizer_settings(named: Mapping[str, str], templates: Mapping[str, str], *, cleans_up: bool = False) -> bytes:
    """Return a bundle's tokenizer_config.json, with the special tokens and the named chat templates.

    Args:
        named: the text of each special token, by its name, such as ``bos_token``.
        templates: the chat templates by name; "default" is left out, because it has its own file.
        cleans_up: whether decoding removes spaces before punctuation.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": cleans_up,
        **named,
    }
    others = [{"name": name, "template": text} for name, text in sorted(templates.items()) if name != "default"]
    if others:
        settings["chat_template"] = others
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


def notes_on_templates(templates: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note if there are chat templates, but none is the default."""
    if not templates or "default" in templates:
        return ()
    return (f"chat templates: expected one named default, found {', '.join(sorted(templates)):.80}; chats are refused",)


def turn_ends(files: Mapping[str, bytes]) -> dict[int, str]:
    """Return the tokens that end an answer in a chat: the tokenizer's eos, and known ends in the chat template.

    Args:
        files: the files of a tokenizer, as in ``TokenizerFiles``; the result is empty without a tokenizer.json.
    """
    if TOKENIZER_FILE not in files:
        return {}
    tokenizer = load_tokenizer(files[TOKENIZER_FILE], Path(TOKENIZER_FILE))
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    written = files.get(TEMPLATE_FILE, b"").decode(errors="replace")
    own = parse_json_object(files.get(CONFIG_FILE, b"{}"), CONFIG_FILE).get("eos_token")
    texts = [own, *(text for text in sorted(ends_by_text(added)) if text in written)]
    ids = {text: tokenizer.token_to_id(text) for text in texts if text is not None}
    return {token_id: text for text, token_id in ids.items() if token_id is not None}


def load_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json``. Raises DynexportError when the tokenizers library refuses it."""
    with told_as(f"{path}: expected a tokenizer.json of the tokenizers library, found something else"):
        return Tokenizer.from_buffer(content)


def _parse(directory: Path, sides: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the fields of a side file, empty if it is absent. Raises DynexportError if it is not a JSON object."""
    return parse_object(sides.get(name, b"{}"), directory / name)


def _read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: from files, else from tokenizer_config.json."""
    folder = sorted(found.name for found in (directory / _TEMPLATES).glob("*.jinja"))
    named: dict[str, str] = {}
    for file in (TEMPLATE_FILE, *(f"{_TEMPLATES}/{name}" for name in folder)):
        if path := find_file(directory, file):
            content = read_file(path)
            with told_as(f"{path}: expected UTF-8 text"):
                named["default" if file == TEMPLATE_FILE else path.stem] = content.decode()
    return named or named_templates(settings.get("chat_template"), str(directory / CONFIG_FILE))


def _named_tokens(directory: Path, settings: Mapping[str, Any], sides: Mapping[str, bytes]) -> dict[str, str]:
    """Return the text of each special token, by name.

    They come from tokenizer_config.json; special_tokens_map.json overrides one without ``added_tokens_decoder``.
    """
    values = {name: settings.get(name) for name in _NAMED}
    if "added_tokens_decoder" not in settings and "special_tokens_map.json" in sides:
        told = _parse(directory, sides, "special_tokens_map.json")
        values |= {name: value for name, value in told.items() if name in _NAMED}
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    for name, text in named.items():
        if not isinstance(text, str | None):
            raise DynexportError(f'{directory / CONFIG_FILE}: {name}: expected text or "content", found {text!r:.80}')
    return {name: text for name, text in named.items() if text is not None}


def _built(
    directory: Path, sides: Mapping[str, bytes], settings: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, str], bool, tuple[str, ...]]:
    """Return transformers' tokenizer, its named tokens, whether it cleans up spaces, and notes."""
    known, unknown = _with_known_flags(directory, sides)
    made = _ask_transformers(directory, {**sides, **known})
    tokenizer, kind = getattr(made, "backend_tokenizer", None), type(made).__name__
    if not isinstance(tokenizer, Tokenizer):
        raise DynexportError(
            f"{directory}: transformers builds a {kind}, which has no tokenizer.json; {ANOTHER_TOKENIZER}"
        )
    if getattr(made, "split_special_tokens", False):
        raise DynexportError(
            f"{directory / CONFIG_FILE}: split_special_tokens: expected false, found true, which a tokenizer.json "
            f"cannot express; {ANOTHER_TOKENIZER}"
        )
    notes = notes_on_ids(tokenizer, directory, sides, settings)
    if unknown:
        notes += (
            f"tokenizer: ignored token flags that a tokenizer.json cannot hold: {', '.join(sorted(unknown)):.200}",
        )
    if TOKENIZER_FILE in sides and _ids(tokenizer) != _ids(load_tokenizer(sides[TOKENIZER_FILE], directory)):
        notes += (
            f"tokenizer: transformers builds a {kind}, whose ids differ from those of tokenizer.json; the bundle has "
            f"transformers' ids (--tokenizer {directory / TOKENIZER_FILE} uses the file unchanged)",
        )
    named = {name: str(token) for name, token in made.special_tokens_map.items() if not isinstance(token, list)}
    cleans_up = bool(made.clean_up_tokenization_spaces) and (
        not isinstance(tokenizer.model, BPE) or bool(settings.get(_CLEANS_UP_BPE))
    )
    if cleans_up:
        # Without a decoder, words are joined by spaces. This one does that too: no word has its prefix.
        join = tokenizer.decoder or decoders.WordPiece(prefix="\0", cleanup=False)
        replacements = [decoders.Replace(before, after) for before, after in CLEAN_UPS.items()]
        tokenizer.decoder = decoders.Sequence([join, decoders.Fuse(), *replacements])
    return tokenizer, named, cleans_up, notes


def _ask_transformers(directory: Path, sides: Mapping[str, bytes]) -> Any:
    """Return transformers' tokenizer, built from copies of the files, without other files or code of the checkpoint."""
    with told_as(f"{directory}: transformers, which builds the tokenizer, cannot be imported; {ANOTHER_TOKENIZER}"):
        import transformers
    config = _parse(directory, sides, "config.json")
    model = json.dumps({name: config[name] for name in _MODEL_FIELDS if name in config})
    names = ", ".join(name for name in _VOCABULARIES if name in sides)
    if TOKENIZER_FILE not in sides and ".model" in names and importlib.util.find_spec("sentencepiece") is None:
        raise DynexportError(
            f"{directory}: building a tokenizer from {names} needs sentencepiece: pip install sentencepiece, or "
            f"{ANOTHER_TOKENIZER}"
        )
    builder = f"transformers {transformers.__version__}"
    what = f"{directory}: {builder} cannot build a tokenizer from {names}; {ANOTHER_TOKENIZER}"
    with tempfile.TemporaryDirectory() as folder, _quiet(transformers), told_as(what):
        for name, content in {**sides, "config.json": model.encode()}.items():
            (Path(folder) / name).write_bytes(content)
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _with_known_flags(directory: Path, sides: Mapping[str, bytes]) -> tuple[dict[str, bytes], set[str]]:
    """Return the side files without token flags that the tokenizers library does not know, and the names of those.

    The library would ignore these flags, but it prints a line on standard output for each.
    """
    unknown: set[str] = set()

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(item) for item in value]
        if not isinstance(value, dict):
            return value
        others = value.keys() - _OF_A_TOKEN if isinstance(value.get("content"), str) else set()
        unknown.update(others)
        return {name: known(item) for name, item in value.items() if name not in others}

    names = [name for name in (CONFIG_FILE, "special_tokens_map.json") if name in sides]
    return {name: json.dumps(known(_parse(directory, sides, name))).encode() for name in names}, unknown


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' log; the notes of ``TokenizerFiles`` say what matters."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text that shows most differences between two tokenizers."""
    with told_as("tokenizer: cannot encode a text"):
        ids: list[int] = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    return ids


def _as_it_stands(
    directory: Path, sides: Mapping[str, bytes], settings: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[Tokenizer, tuple[str, ...]]:
    """Return the tokenizer of an unchanged tokenizer.json. Raises DynexportError when tokens are missing in it."""
    install = f"pip install 'dynexport[torch]', or {ANOTHER_TOKENIZER}"
    if TOKENIZER_FILE not in sides:
        names = ", ".join(name for name in _VOCABULARIES if name in sides)
        raise DynexportError(f"{directory}: building a tokenizer from {names} needs transformers: {install}")
    tokenizer = load_tokenizer(sides[TOKENIZER_FILE], directory / TOKENIZER_FILE)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    declared = {*_parse(directory, sides, "added_tokens.json"), *named.values(), *extra_tokens(settings)}
    missing = declared - added.keys()
    for flags in added_tokens(settings).values():
        token = added.get(flags["content"])
        if token is None or any(flags.get(flag, getattr(token, flag)) != getattr(token, flag) for flag in _FLAGS):
            missing.add(flags["content"])
    if missing:
        shown = ", ".join(sorted(map(repr, missing))[:5])
        raise DynexportError(
            f"{directory}: the tokenizer's side files have tokens or flags that tokenizer.json does not have "
            f"({shown:.200}); adding them needs transformers: {install}"
        )
    kind = settings.get("tokenizer_class")
    if kind in _PLAIN_CLASSES:
        return tokenizer, ()
    return tokenizer, (
        f"tokenizer.json is used unchanged; transformers, which is not installed, may treat {kind!r:.60} differently",
    )
