"""Measure the second moments of the inputs of PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from dynexport.exporter.reference.hugging_face import FloatArray


class InputMoments:
    """Sums of x x^T over all inputs x of modules, which hooks record while a model runs.

    Modules that are called with the same tensor, one after the other, share one sum.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._last: tuple[Any, str] = (None, "")
        self._shared: dict[str, str] = {}

    @contextmanager
    def recorded(self, modules: Mapping[str, Any]) -> Iterator[None]:
        """Record the inputs of these modules, by name, inside the context."""
        hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._last = (None, "")

    def of(self, name: str, columns: int) -> FloatArray:
        """Return the sum for a module, float32 [columns, columns]; zeros for a module that was not called."""
        found = self._sums.get(self._shared.get(name, name))
        return np.zeros((columns, columns), np.float32) if found is None else np.asarray(found.numpy(), np.float32)

    def _hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def record(_: Any, inputs: tuple[Any, ...]) -> None:
            last, before = self._last
            if last is inputs[0]:
                self._shared[name] = self._shared.get(before, before)
                return
            self._last = inputs[0], name
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            product = rows.T @ rows
            self._sums[name] = product if name not in self._sums else self._sums[name].add_(product)

        return record


__all__ = ["InputMoments"]
