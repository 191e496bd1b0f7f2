"""Tokenizer, chat template, streamed text and stop strings; the oracles are tokenizers and transformers."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.text.chat_template import ChatTemplate
from dynexport.runtime.text.text import CLEAN_UPS, StopStrings, StreamDecoder, Text

CORPUS = "The cat sat on the mat. 你好、世界。 こんにちは 🎉🎉 👩‍👩‍👧 naïve café the the cat sat"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if tools %}{{ raise_exception('no tools') }}{% endif %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA = """\
{{ bos_token }}
{%- set state = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if (message.role == 'user') != (state.turns % 2 == 0) %}
        {{- raise_exception('Roles must alternate, user first') }}
    {%- endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{{- messages | length }}{{ {'a': '<b>é'} | tojson }}{{ strftime_now('%Y') }}{{ pad_token is defined }}
"""


def byte_level() -> Tokenizer:
    """GPT-2's kind: any byte can stand alone, so a character can be spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: ▁ for spaces, tokens for bytes outside the vocabulary, the first space dropped."""
    pieces = ["<unk>", *BYTES, *sorted(set("▁Thecatsonm"))]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece's kind with a vocabulary of characters."""
    pieces = sorted({*CORPUS, "▁", "▁the", "▁cat"})
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(CORPUS))) for piece in pieces], unk_id=0))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def text_of(tokenizer: Tokenizer, config: dict[str, Any] | None = None, template: str | None = None) -> Text:
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return Text.from_files(files)


KINDS = {"byte level": byte_level(), "byte fallback": byte_fallback(), "metaspace": metaspace()}
TEXTS = {name: text_of(tokenizer) for name, tokenizer in KINDS.items()}
VOCABULARY = KINDS["byte level"].get_vocab_size()


CLEANED = [*"anvr' .", "n't", "'s", " '"]


def cleaned_up(joined: bool) -> Text:
    """Words whose spaces before punctuation go, as convert writes them."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CLEANED)}, "a"))
    replacements = [decoders.Replace(before, after) for before, after in CLEAN_UPS.items()]
    join = decoders.WordPiece(prefix="\0", cleanup=False) if joined else decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([join, decoders.Fuse(), *replacements])
    return text_of(tokenizer, {"clean_up_tokenization_spaces": True})


TEXTS_THAT_ARE_CLEANED = {joined: cleaned_up(joined) for joined in (True, False)}


def stream(text: Text, ids: list[int], **options: Any) -> list[str]:
    decoder = StreamDecoder(text, **options)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


class TestStreamDecoder:
    @given(st.text(), st.sampled_from(sorted(TEXTS)))
    @example(CORPUS, "byte level")
    @example(CORPUS * 3, "byte fallback")
    @example(CORPUS * 3, "metaspace")
    @example("  the  the", "metaspace")
    def test_the_pieces_of_a_text_are_the_text(self, written: str, kind: str) -> None:
        text = TEXTS[kind]
        ids = text.encode(written)
        whole = text.decode(ids)
        pieces = stream(text, ids)
        assert "".join(pieces) == whole
        assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)

    @given(st.lists(st.integers(0, VOCABULARY + 1), max_size=60), st.booleans())
    def test_any_ids_give_what_decoding_them_gives(self, ids: list[int], skip: bool) -> None:
        text = TEXTS["byte level"]
        pieces = stream(text, ids, skip_special_tokens=skip)
        assert "".join(pieces) == text.decode(ids, skip_special_tokens=skip)

    @given(st.lists(st.sampled_from(["a", "é", "你", "🎉", "\ufffd"]), max_size=30), st.data())
    def test_bad_bytes_between_characters(self, characters: list[str], data: st.DataObject) -> None:
        # Characters whose bytes are one token each, some of them lost or repeated.
        alphabet = byte_tokens()
        ids = [alphabet[byte] for character in characters for byte in character.encode()]
        kept = [token for token in ids for _ in range(data.draw(st.sampled_from([1, 1, 1, 0, 2])))]
        assert "".join(stream(TEXTS["byte level"], kept)) == TEXTS["byte level"].decode(kept)

    def test_a_character_comes_whole_and_at_once(self) -> None:
        alphabet = byte_tokens()
        ids = [alphabet[byte] for byte in "a🎉b".encode()]
        assert stream(TEXTS["byte level"], ids) == ["a", "", "", "", "🎉", "b", ""]

    def test_an_unfinished_character_comes_at_the_end(self) -> None:
        alphabet = byte_tokens()
        decoder = StreamDecoder(TEXTS["byte level"])
        assert [decoder.push(alphabet[byte]) for byte in "🎉".encode()[:3]] == ["", "", ""]
        assert [decoder.finish(), decoder.finish()] == ["\ufffd", ""]

    @pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
    def test_endless_bad_bytes_are_emitted_without_decoding_them_again(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text, tokenizer = TEXTS[kind], KINDS[kind]
        bad = byte_tokens()[0xE5] if kind == "byte level" else tokenizer.token_to_id("<0xE5>")
        longest = 0
        decode = Text.decode

        def measured(self: Text, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(self, ids, **options)

        monkeypatch.setattr(Text, "decode", measured)
        pieces = stream(text, [bad] * 500)
        assert "".join(pieces) == "\ufffd" * 500
        assert all(pieces[4:-1])  # after the first few, each token brings its own
        assert longest <= 25

    @given(st.lists(st.sampled_from("é你🎉".encode()), max_size=40))
    def test_byte_fallback_recovers_after_bad_bytes(self, noise: list[int]) -> None:
        text, tokenizer = TEXTS["byte fallback"], KINDS["byte fallback"]
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in noise]
        pieces = stream(text, [*ids, *text.encode("the 你 cat")])
        assert "".join(pieces).endswith(" the 你 cat" if noise else "the 你 cat")

    def test_special_tokens_and_unknown_ids_cost_no_context(self) -> None:
        text = TEXTS["metaspace"]
        the, special = KINDS["metaspace"].token_to_id("▁the"), KINDS["metaspace"].token_to_id("</s>")
        ids = [the, *[special, 999_999] * 30, the]
        assert "".join(stream(text, ids)) == text.decode(ids) == "the the"

    @given(st.lists(st.integers(0, len(CLEANED) - 1), max_size=40), st.booleans())
    def test_spaces_that_decoding_takes_away(self, ids: list[int], joined: bool) -> None:
        text = TEXTS_THAT_ARE_CLEANED[joined]
        assert "".join(stream(text, ids)) == text.decode(ids)

    def test_an_id_that_is_no_id_is_refused(self) -> None:
        with pytest.raises(DynexportError, match="-1"):
            StreamDecoder(TEXTS["metaspace"]).push(-1)


def byte_tokens() -> dict[int, int]:
    """The id that stands for each byte in the byte-level tokenizer."""
    tokenizer = KINDS["byte level"]
    singles = {}
    for character in pre_tokenizers.ByteLevel.alphabet():
        token_id = tokenizer.token_to_id(character)
        spelled = decoders.ByteLevel().decode([character])
        if spelled != "\ufffd":
            singles[spelled.encode()[0]] = token_id
    # Bytes from 0x80 up decode to nothing alone; GPT-2's table maps 0xA1-0xAC and 0xAE-0xFF to themselves,
    # and the others, in order, to what follows U+00FF.
    others = [byte for byte in range(256) if not (0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE)]
    for byte in range(0x80, 256):
        character = chr(256 + others.index(byte)) if byte in others else chr(byte)
        singles[byte] = tokenizer.token_to_id(character)
    return singles


class TestStopStrings:
    @given(
        st.text("ab🎉", max_size=30),
        st.lists(st.text("ab🎉", min_size=1, max_size=4), max_size=3),
        st.lists(st.integers(0, 30), max_size=8),
    )
    def test_the_text_before_the_first_stop_wherever_it_is_split(
        self, text: str, stops: list[str], cuts: list[int]
    ) -> None:
        watcher = StopStrings(stops)
        bounds = [0, *sorted(cuts), len(text)]
        emitted, stopped = "", False
        for start, end in pairwise(bounds):
            piece, stopped = watcher.push(text[start:end])
            emitted += piece
        assert (emitted + watcher.finish(), stopped) == before_first_stop(text, stops)

    @given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
    def test_nothing_is_held_back_without_need(self, text: str, stops: list[str]) -> None:
        watcher = StopStrings(stops)
        emitted, stopped = watcher.push(text)
        held = text[len(emitted) :]
        assert stopped or not held or any(stop.startswith(held) for stop in stops)

    def test_a_stop_across_pieces(self) -> None:
        watcher = StopStrings(["</s>", "\n\n"])
        assert [watcher.push(piece) for piece in ["a</", "b\n", "\nc", "d"]] == [
            ("a", False),
            ("</b", False),
            ("", True),
            ("", True),
        ]
        assert watcher.finish() == ""

    def test_no_stops_pass_everything(self) -> None:
        watcher = StopStrings([])
        assert watcher.push("all of it") == ("all of it", False)

    def test_an_empty_stop_is_refused(self) -> None:
        with pytest.raises(DynexportError, match="stop"):
            StopStrings(["a", ""])


def before_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By growing the text one character at a time until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


THINKING = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
# What current models' templates use, each thing once.
TEMPLATES = {
    "a date": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}{{ date | default('-') }}",
    "json": "{{ messages | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + loop.index %}{% if ns.n > 2 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{{ loop.index }}"
    "{% endgeneration %}{{ x is defined }}{% endfor %}",
    "tools": "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{% if tools %}T{% endif %}",
    "a macro": "{% macro turn(m, end='|') -%}[{{ m.role | upper }}] {{ m.content | trim }}{{ end }}{%- endmacro %}\n"
    "  {%- for m in messages %}\n    {{ turn(m) }}\n  {% endfor %}\n{% if add_generation_prompt %}A:{% endif %}\n",
    "thinking": THINKING + "{{ enable_thinking | default('unset') }}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d['text'] }}{% endfor %}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{{ messages[2].tool_calls[0] }}",
    "special tokens": "{{ bos_token }}{{ unk_token }}{{ eos_token is defined }}",
    "nulls": "{{ 'name' in messages[1] }}{{ messages[1].get('name', 'none') }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['x'], 2) }}{{ messages[::-1][0].content.split('e')[-1] }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}{{ '%03d' % 7 }}{{ 'a' ~ 1 }}",
}


CONVERSATIONS = [
    [{"role": "user", "content": "Hi the cat"}],
    [{"role": "system", "content": " Be 你好. "}, {"role": "user", "content": "<b>&'quoted'\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two <|im_end|> 🎉"},
        {"role": "user", "content": "three"},
    ],
]


class TestChat:
    @pytest.mark.parametrize(
        ("kind", "template", "conversation", "prompted"),
        [
            *((kind, CHATML, CONVERSATIONS[2], True) for kind in sorted(KINDS)),
            *(("byte level", CHATML, conversation, False) for conversation in CONVERSATIONS),
            *(("metaspace", LLAMA, conversation, True) for conversation in CONVERSATIONS),
        ],
    )
    def test_the_ids_that_transformers_gives(
        self, kind: str, template: str, conversation: list[dict[str, str]], prompted: bool
    ) -> None:
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
        oracle = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind], bos_token="<s>", eos_token="</s>", chat_template=template
        )
        expected = oracle.apply_chat_template(conversation, add_generation_prompt=prompted, return_dict=False)
        text = text_of(KINDS[kind], config, template)
        assert text.has_chat_template
        assert text.chat(conversation, prompted) == expected

    def test_a_template_may_stand_in_the_config(self) -> None:
        alone = text_of(KINDS["byte level"], {"chat_template": "{{ messages[0].content }}"})
        named = [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": "{{ messages[0].role }}"},
        ]
        listed = text_of(KINDS["byte level"], {"chat_template": named})
        message = [{"role": "user", "content": "the cat"}]
        assert alone.decode(alone.chat(message)) == "the cat"
        assert listed.decode(listed.chat(message)) == "user"

    @pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
    def test_a_template_is_rendered_as_transformers_renders_it(self, template: str) -> None:
        oracle = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte level"], bos_token="<s>", unk_token="<unk>")
        messages = [
            {"role": "system", "content": "Be <brief> & 'good'.\n"},
            {"role": "user", "content": " hello 你 ", "name": None},
            {"role": "assistant", "content": "yes", "reasoning": "hm", "tool_calls": [{"function": {"name": "f"}}]},
        ]
        variables = {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}], "unk_token": "other"}
        # What newer versions of transformers do to messages by themselves.
        told = [{name: value for name, value in message.items() if value is not None} for message in messages]
        told[2] = {"thinking": "hm", **told[2], "reasoning_content": "hm"}
        for more in ({}, variables):
            expected = oracle.apply_chat_template(
                told, chat_template=template, add_generation_prompt=True, tokenize=False, **more
            )
            special_tokens = {"bos_token": "<s>", "unk_token": "<unk>"}
            assert ChatTemplate({"default": template}).render(messages, True, special_tokens, more) == expected

    def test_several_templates(self) -> None:
        template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools"})
        message = [{"role": "user", "content": "hi"}]
        assert template.render(message, True, {}, {}) == "plain"
        assert template.render(message, True, {}, {"tools": [{"name": "f"}]}) == "1 tools"
        with pytest.raises(DynexportError, match=r"expected a template named default, found \['rag'\]"):
            ChatTemplate({"rag": "x"}).render(message, True, {}, {})

    def test_variables_that_no_template_reads(self) -> None:
        template = ChatTemplate({"default": THINKING, "rag": "{{ documents }}{% set mine = 1 %}{{ mine }}"})
        assert template.unused(["enable_thinking", "documents", "enable_thinkng", "mine", "tools"]) == [
            "enable_thinkng",
            "mine",
        ]
        with pytest.raises(DynexportError, match="the chat template is damaged"):
            ChatTemplate({"default": "{% if %}"}).unused(["x"])

    @pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
    def test_variables_that_are_ours(self, name: str) -> None:
        with pytest.raises(DynexportError, match=f"template variable {name}: expected another name"):
            ChatTemplate({"default": "x"}).render([{"role": "user", "content": "hi"}], True, {}, {name: []})

    @pytest.mark.parametrize(
        "template",
        ["{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "{{ 10 ** (10 ** 10) }}"],
    )
    def test_a_template_without_end_is_stopped(self, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dynexport.runtime.text.chat_template.SECONDS", 1)
        with pytest.raises(DynexportError, match="the chat template failed: it takes more than 1 s"):
            ChatTemplate({"default": template}).render([{"role": "user", "content": "hi"}], True, {}, {})

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("{{ 'x' * 10 ** 10 }}", "more than 1024 MiB of memory"),
            ("{{ '%9999999999d' % 1 }}", "more than 1024 MiB of memory"),
            (
                "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
                "more than 1024 MiB of memory",
            ),
            ("{{ 'x' * 2 ** 25 }}", "more than 16 Mi characters"),
        ],
    )
    def test_a_template_that_takes_memory_is_stopped(self, template: str, expected: str) -> None:
        # With the whole time limit: a machine may take a second to give a process its first GiB.
        with pytest.raises(DynexportError, match=f"the chat template failed: .*{expected}"):
            ChatTemplate({"default": template}).render([{"role": "user", "content": "hi"}], True, {}, {})

    def test_a_template_that_is_too_long(self) -> None:
        with pytest.raises(
            DynexportError, match="template default: expected at most 1048576 characters, found 2097152"
        ):
            ChatTemplate({"default": "x" * (2 << 20)})

    @pytest.mark.parametrize(
        "template",
        [
            "{% for %}",
            "{{ 1 / 0 }}",
            "{{ messages[7].content.missing }}",
            "{{ raise_exception('no\nthanks\x1b[31m') }}",
            "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update({'role': 'x'}) }}",
            "{{ cycler.__init__.__globals__.os.getpid() }}",
            "{{ namespace(__class__=1) }}",
            "{% set ns = namespace() %}{% set ns._x = 1 %}",
            "{{ strftime_now.__globals__.keys() }}",
            "{% include '/etc/passwd' %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ range(10 ** 9) | list }}",
            "{{ '\ud800' }}",
        ],
    )
    def test_a_hostile_template_is_one_line(self, template: str) -> None:
        text = Text(KINDS["byte level"], {}, ChatTemplate({"default": template}))
        with pytest.raises(DynexportError) as caught:
            text.chat([{"role": "user", "content": "hi"}])
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize(
        "messages",
        [
            [],
            [{"role": "user"}],
            [{"role": "user", "content": 3}],
            [{"role": "u", "content": "c", "x": object()}],
        ],
    )
    def test_messages_that_are_none(self, messages: Any) -> None:
        with pytest.raises(DynexportError, match="messages"):
            text_of(KINDS["byte level"], {}, CHATML).chat(messages)

    def test_without_a_template(self) -> None:
        assert not TEXTS["byte level"].has_chat_template
        with pytest.raises(DynexportError, match="no chat template"):
            TEXTS["byte level"].chat([{"role": "user", "content": "hi"}])


class TestText:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    @pytest.mark.parametrize("processed", [False, True])
    def test_the_tokenizer_alone_decides_which_ids_a_text_has(self, kind: str, processed: bool) -> None:
        tokenizer = Tokenizer.from_str(KINDS[kind].to_str())
        if processed:
            begin = [("<s>", tokenizer.token_to_id("<s>"))]
            tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
        # As transformers 5 takes the flags beside a tokenizer.json: not at all.
        text = text_of(tokenizer, {"bos_token": "<s>", "add_bos_token": not processed, "add_eos_token": True})
        for written in ["", "the cat", "<s> sat</s>"]:
            for special in (True, False):
                assert (
                    text.encode(written, add_special_tokens=special)
                    == tokenizer.encode(written, add_special_tokens=special).ids
                )
                ids = text.encode(written)
                assert text.decode(ids, skip_special_tokens=special) == tokenizer.decode(
                    ids, skip_special_tokens=special
                )

    def test_stored_truncation_and_padding_are_ignored(self) -> None:
        tokenizer = Tokenizer.from_str(KINDS["byte level"].to_str())
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=64)
        assert text_of(tokenizer).encode(CORPUS) == TEXTS["byte level"].encode(CORPUS)

    def test_every_part_is_optional_until_it_is_used(self) -> None:
        with pytest.raises(DynexportError, match=r"tokenizer\.json: the bundle has no tokenizer"):
            Text.from_files({}).encode("hi")
        text = text_of(KINDS["byte level"], template=CHATML)
        assert text.decode(text.encode(CORPUS)) == CORPUS
        assert text.has_chat_template

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer.json", b""),
            ("tokenizer.json", b"{}"),
            ("tokenizer.json", b"\xff\xfe"),
            ("tokenizer.json", b'{"version": "1.0",\n"model": {"type": "What"}}'),
            ("tokenizer_config.json", b"{"),
            ("tokenizer_config.json", b"[]"),
            ("tokenizer_config.json", b'{"eos_token": "a", "eos_token": "b"}'),
            ("tokenizer_config.json", b'{"model_max_length": NaN}'),
            ("tokenizer_config.json", b'{"eos_token": 7}'),
            ("tokenizer_config.json", b'{"chat_template": {"a": 1}}'),
            ("chat_template.jinja", b"\xff"),
        ],
    )
    def test_a_corrupt_file_is_named_in_one_line(self, name: str, content: bytes) -> None:
        files = {"tokenizer.json": KINDS["byte level"].to_str().encode(), name: content}
        with pytest.raises(DynexportError, match=name) as caught:
            Text.from_files(files)
        assert str(caught.value).isprintable()

    def test_a_panic_inside_the_tokenizers_library_is_told_like_any_error(self) -> None:
        broken = json.loads(KINDS["byte level"].to_str())
        charsmap = base64.b64encode(b"\xff\xff\xff\x7f").decode()
        broken["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
        with pytest.raises(DynexportError, match=r"tokenizer\.json"):
            Text.from_files({"tokenizer.json": json.dumps(broken).encode()})

    def test_what_cannot_be_encoded_or_decoded(self) -> None:
        with pytest.raises(DynexportError, match="expected UTF-8, found"):
            TEXTS["byte level"].encode("\ud800")
        for bad in (-1, 2**40):
            with pytest.raises(DynexportError, match="cannot decode"):
                TEXTS["byte level"].decode([bad])
