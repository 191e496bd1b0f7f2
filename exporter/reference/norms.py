"""Find the input norm of a layer by recording module calls, and measure a norm's epsilon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noted_calls(layer: Any) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Record calls of a layer's modules, as (name, arguments), in the yielded list."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def note(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _, args, kwargs: calls.append((name, (*args, *kwargs.values())))

    named = [(name, module) for name, module in layer.named_modules() if name]
    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in named]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def is_norm(layer: Any, name: str, hidden: Any) -> bool:
    """Return whether a module of a layer has parameters of shape [hidden] only."""
    shapes = {tuple(value.shape) for value in layer.get_submodule(name).parameters()}
    return shapes == {(hidden.shape[-1],)}


def norm_epsilon(norm: Any) -> float:
    """Return the epsilon of a norm over the last axis, measured with a tiny input.

    For an input x = +a, -a, +a, .., RMSNorm and LayerNorm both give y = c x / sqrt(m + epsilon), where m is the mean
    square, which equals the variance. A large a gives c; a tiny a then gives epsilon = (a c / y)^2 - m.

    Args:
        norm: a module with parameters [hidden]; they may be on the meta device.
    """
    import torch
    from torch.func import functional_call

    # In float32 a tiny input added to a bias would be lost.
    parameters = {name: torch.ones(value.shape, dtype=torch.float64) for name, value in norm.named_parameters()}
    signs = torch.ones_like(next(iter(parameters.values())))
    signs[1::2] = -1
    signs[len(signs) // 2 * 2 :] = 0  # keeps the mean 0 for an odd size
    share = float(signs.square().mean())

    def half_range(a: float) -> float:
        y = functional_call(norm, parameters, (a * signs[None],))[0]
        return float((y[0] - y[1]) / 2)  # a bias cancels out

    tiny = 1e-8
    with torch.no_grad():
        epsilon = share * ((tiny * half_range(1e4) / half_range(tiny)) ** 2 - tiny**2)
    return float(f"{max(epsilon, 0.0):.5g}")


__all__ = ["is_norm", "norm_epsilon", "noted_calls"]
