"""The deprecated ``Generator``: ``Model`` before version 0.2, with ``speedup`` for ``depth``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.batch import Tokens
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.request import Generation
from dynexport.runtime.generation.stream import Stream


class Generator:
    """Deprecated: use ``dynexport.load`` or ``Model``. The next release removes it.

    Attributes:
        bundle: the opened bundle.
        text: its tokenizer and chat template.

    Args:
        bundle: an opened bundle.
        threads: as for ``Model``.
        backend: as for ``Model``.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, *, backend: RunBackend = "onnxruntime") -> None:
        warnings.warn("Generator is called Model now, and speedup is called depth", DeprecationWarning, stacklevel=2)
        self._model = Model(bundle, threads, backend=backend)
        self.bundle, self.text = self._model.bundle, self._model.text

    def generate(self, prompts: Sequence[Tokens], *, speedup: Any = None, **options: Any) -> list[Generation]:
        """Generate from prompts of token ids, as ``Model.generate`` does."""
        return self._model.generate(list(prompts), depth=speedup, **options)

    def stream(self, prompts: Sequence[Tokens], *, speedup: Any = None, **options: Any) -> Stream:
        """Generate token by token, as ``Model.stream`` does."""
        return self._model.stream(list(prompts), depth=speedup, **options)


__all__ = ["Generator"]
