"""A chat on one cache: later turns say what a fresh start with all the messages would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundles import CHAT, talking_checkpoint

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Model, Sampling
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.conversation import Conversation

NEW = 8
# Tells earlier answers without their text, as templates of reasoning models do.
FORGETFUL = CHAT.replace("message.content", "('' if message.role == 'assistant' else message.content)")


SAMPLING = Sampling(repetition_penalty=1.3)  # what was said before counts, cached or not


def say(conversation: Conversation, content: str, depth: float = 1) -> list[int]:
    pieces = conversation.say(content, depth=depth, max_new_tokens=NEW, sampling=SAMPLING)
    return [piece.token for piece in pieces]


def afresh(generator: Model, messages: list[dict[str, str]]) -> list[int]:
    """The answer to messages that nothing is cached of."""
    prompt = generator.text.chat(messages)
    return generator.generate([prompt], depth=1, max_new_tokens=NEW, sampling=SAMPLING, chat=True)[0].ids


@pytest.mark.parametrize("template", [CHAT, FORGETFUL], ids=["growing", "forgetful"])
def test_every_turn_at_full_depth_is_what_a_fresh_start_says(tmp_path: Path, template: str) -> None:
    convert(talking_checkpoint(tmp_path / "m", template=template), tmp_path / "b", golden=False)
    generator = Model(Bundle.open(tmp_path / "b"), threads=1)
    conversation = Conversation(generator, system="Be brief.")
    for content in ("Hello there", "And then?", "Why?"):
        asked = [*conversation.messages, {"role": "user", "content": content}]
        assert say(conversation, content) == afresh(generator, asked)
        assert [message["role"] for message in conversation.messages[-2:]] == ["user", "assistant"]


def test_a_later_turn_feeds_only_what_is_new(generator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    run = generator.executor.run
    monkeypatch.setattr(
        generator.executor, "run", lambda cache, batch: fed.append(len(batch.tokens[0])) or run(cache, batch)
    )
    conversation = Conversation(generator)
    ids = say(conversation, "Hello there", depth=2)
    special = len(generator.text.decode(ids)) < len(ids)
    say(conversation, "And then?", depth=2)
    everything = len(generator.text.chat(conversation.messages[:3]))
    assert special or fed[1] == everything - fed[0] - (NEW - 1)


def test_an_answer_that_is_left_off_is_what_the_next_turn_goes_on_from(generator: Model) -> None:
    conversation = Conversation(generator)
    pieces = conversation.say("Hello there", depth=1, max_new_tokens=NEW, sampling=Sampling())
    begun = next(pieces).text + next(pieces).text
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    asked = [*conversation.messages, {"role": "user", "content": "Go on"}]
    assert say(conversation, "Go on") == afresh(generator, asked)


def test_a_message_that_does_not_fit_is_not_kept(generator: Model) -> None:
    conversation = Conversation(generator)
    say(conversation, "Hello")
    before = list(conversation.messages)
    with pytest.raises(DynexportError, match="prompt: expected at most"):
        say(conversation, "e" * 300)
    assert conversation.messages == before
    asked = [*before, {"role": "user", "content": "Still there?"}]
    assert say(conversation, "Still there?") == afresh(generator, asked)


def test_an_answer_that_is_interrupted_within_a_step_leaves_the_cache_whole(
    generator: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(generator)
    commit, fed = KvCache.commit, []

    def interrupted(self: KvCache, *arguments: Any) -> None:
        fed.append(self)
        commit(self, *arguments)
        if len(fed) == 4:  # after the prompt and three tokens, when only half of it is written down
            self.positions -= 1
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(KvCache, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(conversation, "Hello there")
    asked = [*conversation.messages, {"role": "user", "content": "Go on"}]
    assert len(conversation.messages[-1]["content"]) > 0
    assert say(conversation, "Go on") == afresh(generator, asked)


def test_caches_grow_with_the_conversation(generator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynexport.runtime.generation.conversation.STEP", 16)
    conversation = Conversation(generator)
    rooms = []
    for content in ("Hi", "And then?", "Why?"):
        asked = [*conversation.messages, {"role": "user", "content": content}]
        assert say(conversation, content) == afresh(generator, asked)
        rooms.append(conversation._cache.buffers["0.key"].shape[2])
    assert rooms[0] < rooms[-1] < conversation.context


def test_variables_of_the_template(tmp_path: Path) -> None:
    template = "{{ 'quiet ' if enable_thinking is false }}" + CHAT
    convert(talking_checkpoint(tmp_path / "m", template=template), tmp_path / "b", golden=False)
    generator = Model(Bundle.open(tmp_path / "b"), threads=1)
    message = [{"role": "user", "content": "Hi"}]
    quiet = generator.text.chat(message, variables={"enable_thinking": False})
    assert quiet != generator.text.chat(message)
    answers = [say(Conversation(generator, variables=given), "Hi") for given in ({"enable_thinking": False}, {})]
    assert answers[0] == generator.generate([quiet], depth=1, max_new_tokens=NEW, sampling=SAMPLING)[0].ids
    assert answers[1] == afresh(generator, message)
