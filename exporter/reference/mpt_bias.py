"""Make transformers' MPT bias attention by the tokens that it is given, so that layers may run some of them only.

The class makes one bias for ``max_seq_len`` positions and cuts off its end: as long as the keys, whichever tokens they
belong to. A bias for the tokens of the call differs from that end by nothing, and has an axis of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def bias_by_tokens(model: Any) -> None:
    """Change an MPT model in place; another model stays as it is."""
    trunk = getattr(model, "transformer", None)
    whole = getattr(trunk, "build_mpt_alibi_tensor", None)
    if trunk is None or whole is None:
        return
    tokens = 0

    def count(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        nonlocal tokens
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next(value for value in given if value is not None).shape[1]

    def build(heads: int, _: int, **others: Any) -> Any:
        return whole(heads, tokens, **others)

    trunk.register_forward_pre_hook(count, with_kwargs=True)
    trunk.build_mpt_alibi_tensor = build


__all__ = ["bias_by_tokens"]
