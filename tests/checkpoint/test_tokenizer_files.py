"""A directory's tokenizer becomes one tokenizer.json with transformers' ids; what cannot is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from bundles import talking_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from dynexport.exporter.bundle.describe import describe_source, describe_tokens, notes_on_tokens
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.tokenizer_files import TokenizerFiles, read_tokenizer, turn_ends
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.text.text import StreamDecoder, Text

MARK = "\u2581"
TEXTS = [
    "",
    "hello<|turn|> world",
    " hello <|turn|>  <|TURN|>x<|turn|>",
    "<s>it's, a <mask> . </s> they 're n't !",
    "12345\n\n tab\tnaïve 你好 🎉",
]


def byte_level(*, digits: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2"), ("12", "3")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    words_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words_of]) if digits else words_of
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def framed() -> Tokenizer:
    tokenizer = byte_level()
    known = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=known)
    return tokenizer


def with_turn() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|turn|>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK, *"helowrd,.'", f"{MARK}h"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(MARK, "h")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [(piece, -float(i)) for i, piece in enumerate([MARK, *"helowrdthiysamn,.!'", f"{MARK}hello", "n't"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    words = [
        "[UNK]",
        "hello",
        "world",
        "they",
        "it",
        "a",
        "s",
        "re",
        "n",
        "t",
        "##lo",
        "##s",
        ".",
        ",",
        "'",
        "!",
        "hel",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def word_level() -> Tokenizer:
    words = ["<unk>", "hello", "world", "they", "'", "re", "n't", ".", ",", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def write(directory: Path, files: dict[str, Any]) -> Path:
    """A directory of files: tokenizers, texts, or values that are written as JSON."""
    directory.mkdir(exist_ok=True)
    for name, value in files.items():
        if isinstance(value, Tokenizer):
            value = value.to_str()
        (directory / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


def vocabulary_files(tokenizer: Tokenizer) -> dict[str, Any]:
    """What there was before tokenizer.json."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {"vocab.json": tokenizer.get_vocab(), "merges.txt": f"#version: 0.2\n{merges}\n"}


def settings(kind: str | None = "PreTrainedTokenizerFast", **fields: Any) -> dict[str, Any]:
    return {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"} | fields


SIZE = byte_level().get_vocab_size()
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
TURN = {"content": "<|turn|>", **FLAGS}
LLAMA, GPT2 = {"model_type": "llama"}, {"model_type": "gpt2"}
UNCLEANED = "BPE, which is never cleaned up"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tokenizer.json alone": {"tokenizer.json": framed()},
    "flags of bos and eos": {
        "tokenizer.json": framed(),
        "tokenizer_config.json": settings(add_bos_token=False, add_eos_token=True),
    },
    "flags without a post-processor": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(add_bos_token=True),
    },
    "GPTNeoX heeds its flags": {
        "config.json": {"model_type": "gpt_neox"},
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings("GPTNeoXTokenizer", add_bos_token=True),
    },
    **{
        f"added_tokens_decoder with {name}": {
            "tokenizer.json": tokenizer(),
            "tokenizer_config.json": settings(added_tokens_decoder={str(SIZE): TURN | flags}),
        }
        for tokenizer in (byte_level, with_turn)
        for name, flags in {
            f"nothing, {tokenizer.__name__}": {},
            f"rstrip, {tokenizer.__name__}": {"rstrip": True},
            f"lstrip, {tokenizer.__name__}": {"lstrip": True},
            f"single_word, {tokenizer.__name__}": {"single_word": True},
            f"normalized, {tokenizer.__name__}": {"normalized": True, "special": False},
        }.items()
    },
    "added_tokens.json": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(),
        "added_tokens.json": {"<|turn|>": SIZE, "<mask>": SIZE + 1},
    },
    "special_tokens_map.json": {
        "tokenizer.json": byte_level(),
        "special_tokens_map.json": {"mask_token": {"content": "<mask>", **FLAGS, "lstrip": True}, "eos_token": "</s>"},
    },
    "special_tokens_map.json and added_tokens.json": {
        "tokenizer.json": sentencepiece(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"additional_special_tokens": ["<|turn|>"], "bos_token": "<s>"},
        "added_tokens.json": {"<|turn|>": 300},
    },
    "extra_special_tokens": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(extra_special_tokens=["<|turn|>", "<mask>"]),
    },
    "extra_special_tokens with names": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(extra_special_tokens={"turn_token": "<|turn|>"}),
    },
    "additional_special_tokens": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(additional_special_tokens=["<|turn|>"]),
    },
    "a special token that only its name makes special": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(eos_token="hello"),
    },
    "Llama's class beside byte-level words": {
        "config.json": LLAMA,
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings("LlamaTokenizerFast", legacy=True),
    },
    "Llama's class": {
        "config.json": LLAMA,
        "tokenizer.json": sentencepiece(),
        "tokenizer_config.json": settings("LlamaTokenizer", legacy=False),
    },
    "Gemma's class": {
        "config.json": {"model_type": "gemma2"},
        "tokenizer.json": sentencepiece(),
        "tokenizer_config.json": settings("GemmaTokenizer"),
    },
    "GPT-2's class, which forgets digits": {
        "config.json": LLAMA,
        "tokenizer.json": byte_level(digits=True),
        "tokenizer_config.json": settings("GPT2Tokenizer"),
    },
    "GPT-2's class without a name": {"config.json": GPT2, "tokenizer.json": byte_level()},
    "vocab.json and merges.txt": {
        "config.json": GPT2,
        "tokenizer_config.json": settings("GPT2Tokenizer", unk_token="</s>"),
        **vocabulary_files(byte_level()),
    },
    "vocab.json and merges.txt, with a space in front": {
        "config.json": {"model_type": "opt"},
        "tokenizer_config.json": settings("GPT2Tokenizer", add_prefix_space=True, add_bos_token=True),
        **vocabulary_files(byte_level()),
    },
    "Unigram": {"tokenizer.json": unigram()},
    "Unigram that is cleaned up": {
        "tokenizer.json": unigram(),
        "tokenizer_config.json": {"clean_up_tokenization_spaces": True},
    },
    "WordPiece that is cleaned up": {
        "tokenizer.json": word_piece(),
        "tokenizer_config.json": {"clean_up_tokenization_spaces": True},
    },
    "words that are cleaned up": {
        "tokenizer.json": word_level(),
        "tokenizer_config.json": {"clean_up_tokenization_spaces": True},
    },
    UNCLEANED: {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(clean_up_tokenization_spaces=True),
    },
    "BPE that is cleaned up all the same": {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": settings(
            clean_up_tokenization_spaces=True,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
        ),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    theirs = AutoTokenizer.from_pretrained(write(tmp_path / "model", LAYOUTS[layout]))
    found = read_tokenizer(tmp_path / "model")
    ours = Text.from_files(found.files)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name, content in found.files.items():
        (bundle / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(bundle)
    for written in TEXTS:
        ids = theirs(written)["input_ids"]
        assert ours.encode(written) == ids == again(written)["input_ids"]
        assert ours.encode(written, add_special_tokens=False) == theirs(written, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            cleans = None if layout != UNCLEANED else False  # which versions before 5.7 have to be told
            text = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=cleans)
            assert ours.decode(ids, skip_special_tokens=skip) == text
            assert "".join(stream(ours, ids, skip)) == text
    named = json.loads(found.files.get("tokenizer_config.json", b"{}"))
    assert {name: named.get(name) for name in theirs.special_tokens_map} == theirs.special_tokens_map


def stream(text: Text, ids: list[int], skip: bool) -> list[str]:
    decoder = StreamDecoder(text, skip_special_tokens=skip)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


def read(directory: Path, files: dict[str, Any], **options: Any) -> TokenizerFiles:
    return read_tokenizer(write(directory, files), **options)


def refusal(directory: Path, files: dict[str, Any]) -> str:
    with pytest.raises(DynexportError) as caught:
        read(directory, files)
    message = str(caught.value)
    assert str(directory) in message and len(message) < 900
    return message


class TestNotes:
    def test_nothing_to_tell_of_a_plain_tokenizer(self, tmp_path: Path) -> None:
        assert read(tmp_path, {"tokenizer.json": framed(), "tokenizer_config.json": settings()}).notes == ()

    def test_a_class_that_splits_text_otherwise(self, tmp_path: Path) -> None:
        notes = read(tmp_path, LAYOUTS["GPT-2's class, which forgets digits"]).notes
        theirs, stored = AutoTokenizer.from_pretrained(tmp_path)("12345")["input_ids"], byte_level(digits=True)
        if theirs == stored.encode("12345").ids:  # versions that do not have it forget
            assert notes == ()
        else:
            (note,) = notes
            assert "GPT2Tokenizer" in note and "--tokenizer" in note

    def test_ids_that_are_not_those_of_the_files(self, tmp_path: Path) -> None:
        added = {str(SIZE + 5): TURN}
        (note,) = read(
            tmp_path,
            {"tokenizer.json": byte_level(), "tokenizer_config.json": settings(added_tokens_decoder=added)},
        ).notes
        assert str(SIZE) in note and str(SIZE + 5) in note and "<|turn|>" in note

    def test_tokens_beyond_the_model(self, tmp_path: Path) -> None:
        files = {"config.json": {"vocab_size": SIZE - 1}, "tokenizer.json": byte_level()}
        (note,) = read(tmp_path, files).notes
        assert "'</s>'" in note and str(SIZE - 1) in note

    def test_flags_that_are_unknown(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        added = {str(SIZE - 1): {"content": "</s>", "special": True, "shiny": 1}}
        files = {"tokenizer.json": byte_level(), "tokenizer_config.json": settings(added_tokens_decoder=added)}
        (note,) = read(tmp_path, files).notes
        assert "cannot hold: shiny" in note
        assert capfd.readouterr().out == ""  # where a report in JSON may go


def rendered(found: TokenizerFiles, **variables: Any) -> str:
    """A chat's text, of a tokenizer of single bytes."""
    tokenizer = {"tokenizer.json": byte_level().to_str().encode()}
    text = Text.from_files({**found.files, **tokenizer})
    return text.decode(text.chat([{"role": "user", "content": "x"}], variables=variables))


class TestChatTemplate:
    def test_files_go_before_settings(self, tmp_path: Path) -> None:
        files = {"tokenizer_config.json": settings(chat_template="old"), "chat_template.jinja": "new"}
        assert read(tmp_path, files).files["chat_template.jinja"] == b"new"

    def test_a_folder_of_them(self, tmp_path: Path) -> None:
        folder = tmp_path / "additional_chat_templates"
        folder.mkdir()
        (folder / "tool_use.jinja").write_text("tools")
        found = read(tmp_path, {"tokenizer_config.json": settings(chat_template="old")})
        assert "chat_template.jinja" not in found.files
        assert "tool_use" in found.notes[0]
        (folder / "default.jinja").write_text("new")
        found = read_tokenizer(tmp_path)
        assert found.files["chat_template.jinja"] == b"new"
        assert rendered(found, tools=["f"]) == "tools"

    def test_one_for_tools_in_settings(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "none"}]
        found = read(tmp_path, {"tokenizer.json": byte_level(), "tokenizer_config.json": settings(chat_template=named)})
        assert (rendered(found), rendered(found, tools=["f"])) == ("none", "['f']")


def test_a_path_that_is_no_utf8_is_named_in_the_manifest(tmp_path: Path) -> None:
    path = talking_checkpoint(tmp_path / "model").rename(tmp_path / "caf\udce9")
    source = describe_source(open_checkpoint(path))
    assert "caf\\\\udce9" in source.model_dump_json()


class TestTurnEnds:
    def test_the_tokenizers_own_end_and_what_the_template_writes(self, tmp_path: Path) -> None:
        tokenizer = byte_level()
        tokenizer.add_special_tokens(["<|im_end|>", "<|eot_id|>"])
        template = "{{ messages[0].content }}<|im_end|>"
        files = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings(chat_template=template)}
        ends = {tokenizer.token_to_id(text): text for text in ("</s>", "<|im_end|>")}
        assert turn_ends(read(tmp_path, files).files) == ends

    def test_the_manifest_has_those_that_the_config_does_not_name(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(talking_checkpoint(tmp_path / "model", eos_token_id=5))
        tokens = describe_tokens(checkpoint, 100)
        assert (tokens.eos, tokens.turn_end) == ((5,), (88,))
        (note,) = notes_on_tokens(checkpoint, tokens)
        assert "'<|im_end|>' (88)" in note and "[5]" in note
        (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [5, 88]}')
        checkpoint = open_checkpoint(tmp_path / "model")
        tokens = describe_tokens(checkpoint, 100)
        assert (tokens.eos, tokens.turn_end, notes_on_tokens(checkpoint, tokens)) == ((5, 88), (), ())

    def test_ids_that_are_no_tokens_are_named(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(talking_checkpoint(tmp_path / "model", eos_token_id=[-1, 5, 100, 10**30]))
        tokens = describe_tokens(checkpoint, 100)
        assert tokens.eos == (5,)
        assert "eos_token_id: left out -1, 100, 1000000" in notes_on_tokens(checkpoint, tokens)[0]
        tokens = describe_tokens(checkpoint, 5)
        assert (tokens.eos, tokens.turn_end) == ((), ())
        assert "plain prompts have no end" in notes_on_tokens(checkpoint, tokens)[0]

    def test_nothing_without_a_tokenizer(self, tmp_path: Path) -> None:
        assert turn_ends(read(tmp_path, {"tokenizer_config.json": settings()}).files) == {}


class TestRefusals:
    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "What"}}'])
    def test_a_damaged_tokenizer(self, tmp_path: Path, content: str) -> None:
        assert "tokenizer.json" in refusal(tmp_path, {"tokenizer.json": content})

    def test_a_panic_of_the_tokenizers_library(self, tmp_path: Path) -> None:
        broken = json.loads(byte_level().to_str())
        broken["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "////fw=="}
        assert "--tokenizer" in refusal(tmp_path, {"tokenizer.json": broken})

    def test_settings_of_another_form(self, tmp_path: Path) -> None:
        assert "eos_token" in refusal(tmp_path, {"tokenizer_config.json": {"eos_token": 7}})
        assert "tokenizer_config.json" in refusal(tmp_path, {"tokenizer_config.json": []})

    def test_code_of_the_checkpoint_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "code.py").write_text("raise SystemExit('ran')")
        auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
        files = {"tokenizer.json": byte_level(), "tokenizer_config.json": settings("Custom", auto_map=auto_map)}
        assert "--tokenizer" in refusal(tmp_path, files)

    def test_what_no_tokenizer_json_can_say(self, tmp_path: Path) -> None:
        files = {"tokenizer.json": byte_level(), "tokenizer_config.json": settings(split_special_tokens=True)}
        assert "split_special_tokens" in refusal(tmp_path, files)

    def test_a_sentencepiece_model_names_the_way(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, {"config.json": LLAMA, "tokenizer.model": "not a model"})
        assert "tokenizer.model" in message and "--tokenizer" in message

    def test_nothing_is_built_where_the_user_has_another(self, tmp_path: Path) -> None:
        files = {"tokenizer.json": "damaged", "tokenizer_config.json": settings()}
        assert set(read(tmp_path, files, build=False).files) == {"tokenizer_config.json"}


class TestWithoutTransformers:
    @pytest.fixture(autouse=True)
    def hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else found(name, *rest)
        )

    def test_a_complete_tokenizer_json_is_taken_as_it_stands(self, tmp_path: Path) -> None:
        added = {str(SIZE): TURN | {"special": False}, str(SIZE - 1): {"content": "</s>", **FLAGS}}
        files = {"tokenizer.json": with_turn(), "tokenizer_config.json": settings(added_tokens_decoder=added)}
        found = read(tmp_path, files)
        assert found.notes == ()
        assert json.loads(found.files["tokenizer.json"]) == json.loads(with_turn().to_str())
        assert json.loads(found.files["tokenizer_config.json"])["eos_token"] == "</s>"

    @pytest.mark.parametrize(
        "sides",
        [
            {"tokenizer_config.json": settings(added_tokens_decoder={str(SIZE): TURN})},
            {"tokenizer_config.json": settings(extra_special_tokens=["<x>"])},
            {"tokenizer_config.json": settings(pad_token="<x>")},
            {"added_tokens.json": {"<x>": SIZE}},
            {"special_tokens_map.json": {"pad_token": "<x>"}},
        ],
    )
    def test_side_files_that_say_more_are_refused(self, tmp_path: Path, sides: dict[str, Any]) -> None:
        message = refusal(tmp_path, {"tokenizer.json": with_turn()} | sides)
        assert "transformers" in message and "dynexport[torch]" in message and "--tokenizer" in message

    def test_other_vocabularies_name_the_way(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, vocabulary_files(byte_level()))
        assert "vocab.json, merges.txt" in message and "dynexport[torch]" in message

    def test_a_class_that_transformers_would_heed_is_told(self, tmp_path: Path) -> None:
        (note,) = read(tmp_path, LAYOUTS["GPT-2's class, which forgets digits"]).notes
        assert "'GPT2Tokenizer'" in note
