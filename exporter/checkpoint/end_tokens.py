"""Known texts of tokens that end an answer, because checkpoints often name only some of their ids."""

from __future__ import annotations

from collections.abc import Collection

# llama.cpp always ends generation at these, also if a file does not name them (src/llama-vocab.cpp, special_eog_ids).
_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek writes it so
        "[e~[",
    }
)
# (tokens, part): in a vocabulary with all of these tokens, ``part`` only closes a part of an answer (harmony, gemma4).
_PARTS = (
    (frozenset({"<|return|>", "<|call|>", "<|end|>"}), "<|end|>"),
    (frozenset({"<|return|>", "<|calls|>", "<|end|>"}), "<|end|>"),
    (frozenset({"<|flush|>", "<|call|>", "<|end|>"}), "<|end|>"),
    (frozenset({"<|flush|>", "<|calls|>", "<|end|>"}), "<|end|>"),
    (frozenset({"<|tool_response>", "</s>"}), "</s>"),
)


def ends_by_text(tokens: Collection[str]) -> frozenset[str]:
    """Return the tokens of a vocabulary that end an answer, by their text."""
    found = _ENDS.intersection(tokens)
    return found - {part for together, part in _PARTS if together <= found}


def parts_by_text(tokens: Collection[str]) -> frozenset[str]:
    """Return the end tokens that only close a part of an answer in this vocabulary."""
    found = _ENDS.intersection(tokens)
    return frozenset(part for together, part in _PARTS if together <= found)
