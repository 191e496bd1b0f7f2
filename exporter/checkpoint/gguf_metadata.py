"""Typed access to the metadata of a GGUF file, with a record of the values that are used."""

from __future__ import annotations

import math
from typing import Any

from dynexport.exporter.checkpoint.gguf_header import GgufHeader
from dynexport.runtime.bundle.errors import DynexportError

_NO_TOKEN = 2**32 - 1
# Values that these families do not compute with. Those of experts and of a rotary scaling are listed for files that
# have no experts or no scaling; in others they are read.
_WITHOUT_EFFECT = {
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "expert_used_count",
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "vocab_size",
}


class Metadata:
    """Typed access to the metadata of a GGUF file.

    Args:
        header: the header of the file.

    Attributes:
        header: the header of the file.
        architecture: the value of ``general.architecture``.
        notes: the values that are not used, one line each, for the summary of ``convert``.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.notes: tuple[str, ...] = ()
        self._values = header.metadata
        self.architecture = str(header.metadata.get("general.architecture"))
        self._asked: set[str] = set()

    def error(self, key: str, expected: str) -> DynexportError:
        """Return an error that names the key, the expected value and the value found."""
        found = f"{self._values[key]!r:.80}" if key in self._values else "nothing"
        return DynexportError(
            f"{self.header.path}: metadata {key}: expected {expected}, found {found}; "
            "convert the Hugging Face directory instead"
        )

    def key(self, name: str) -> str:
        """Return the full key of a value of the architecture."""
        return f"{self.architecture}.{name}"

    def optional(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """Return the value of a full key, or None; a list of equal values, one per layer, counts as one value."""
        self._asked.add(key)
        value = self._values.get(key)
        if isinstance(value, list) and kind is not list and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise self.error(key, expected)
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a size of the architecture, greater than 0.

        Raises:
            DynexportError: when it is not an integer > 0, or is absent and has no default.
        """
        key = self.key(name)
        value = self.optional(key, int, "an integer > 0")
        if value is None and default is not None:
            return default
        if value is None or value < 1:
            raise self.error(key, "an integer > 0")
        return int(value)

    def number(self, name: str) -> float | None:
        """Return a finite number >= 0 of the architecture, or None."""
        value = self.finite(self.key(name))
        return None if value is None else float(value)

    def finite(self, key: str) -> int | float | None:
        """Return the finite number >= 0 of a full key, or None."""
        value: int | float | None = self.optional(key, (int, float), "a number")
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise self.error(key, "a finite number >= 0")
        return value

    def check_known(self) -> None:
        """Check that every value of the architecture was read, is known to have no effect, or is false.

        Raises:
            DynexportError: for the first value that may change what the model computes.
        """
        prefix = self.key("")
        for key in sorted(self._values.keys() - self._asked):
            is_off = self._values[key] is False or key.removeprefix(prefix) in _WITHOUT_EFFECT
            if key.startswith(prefix) and not is_off:
                raise self.error(key, "no such value, because it may change what the model computes")

    def token(self, name: str) -> int | None:
        """Return the id of a special token, such as ``bos``; None if it is absent or -1."""
        value = self.optional(f"tokenizer.ggml.{name}_token_id", int, "a token id")
        return None if value in (None, _NO_TOKEN) else int(value)
