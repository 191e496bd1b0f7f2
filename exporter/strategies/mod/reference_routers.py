"""The routers and adapters of Mixture-of-Depths in PyTorch: their tensors, and what they compute."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.reference.stored import Tensors, read_router_tensor
from dynexport.runtime.bundle.contract import Mod

Parts = dict[str, Any]
_PRODUCT = ("linear", "pair")


def read_router(tensors: Tensors, contract: Mod, layer: int, hidden: int, name: str = "mod_router") -> Parts:
    """Return the float32 tensors of a router, and of the predictor if it decides.

    Args:
        tensors: the checkpoint's tensors.
        contract: the contract of the routers.
        layer: the layer's number.
        hidden: size of the hidden states.
        name: the router's name in the layer.

    Returns:
        The tensors by name, without the layer's and the router's name; the predictor's begin with ``predictor.``.

    Raises:
        DynexportError: for a tensor that is absent, of another shape or not finite.
    """
    prefix, kind = f"model.layers.{layer}.{name}.", contract.router.kind
    if kind in _PRODUCT:
        rows = 2 if kind == "pair" else 1
        return _read(tensors, prefix, {"weight": (rows, hidden)}, {"bias": (rows,)}) | _predictor(
            tensors, contract, layer, hidden
        )
    width = _width(tensors, prefix + "fc1.weight")
    needed: dict[str, tuple[int, ...]] = {"fc1.weight": (width, hidden), "fc2.weight": (1, width)}
    optional: dict[str, tuple[int, ...]] = {"fc1.bias": (width,), "fc2.bias": (1,)}
    (needed if kind == "bottleneck" else optional)["norm.weight"] = (width,)
    return _read(tensors, prefix, needed, optional)


def read_adapter(tensors: Tensors, layer: int, hidden: int) -> Parts:
    """Return the float32 tensors of a layer's adapter: gate, up and down; errors as for ``read_router``."""
    prefix = f"model.layers.{layer}.mod_adapter."
    width = _width(tensors, prefix + "gate_proj.weight")
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {part: _tensor(tensors, f"{prefix}{part}_proj.weight", expected) for part, expected in shapes.items()}


def score_of(contract: Mod, parts: Parts, x: Any, epsilon: float) -> tuple[Any, Any]:
    """Return the score r and the logit of the causal rule, float32 [tokens], for a router's input [tokens, hidden]."""
    import torch

    kind = contract.router.kind
    if kind in _PRODUCT:
        scores = x @ parts["weight"].T + parts.get("bias", 0.0)
        score = logit = scores[:, 0] - scores[:, 1] if kind == "pair" else scores[:, 0]
        if "predictor.fc1.weight" in parts:
            inner = x @ parts["predictor.fc1.weight"].T + parts["predictor.fc1.bias"]
            inner = torch.nn.functional.silu(inner)
            logit = (inner @ parts["predictor.fc2.weight"].T + parts["predictor.fc2.bias"])[:, 0]
        return score, logit
    inner = x @ parts["fc1.weight"].T + parts.get("fc1.bias", 0.0)
    if "norm.weight" in parts:
        mean_square = inner.pow(2).mean(dim=-1, keepdim=True)
        inner = inner * torch.rsqrt(mean_square + (contract.router.epsilon or epsilon)) * parts["norm.weight"]
    if kind == "bottleneck":
        inner = torch.tanh(inner)
    else:
        inner = torch.relu(inner) if contract.router.activation == "relu" else torch.nn.functional.silu(inner)
    score = (inner @ parts["fc2.weight"].T + parts.get("fc2.bias", 0.0))[:, 0]
    return score, score


def adapted(parts: Parts, z: Any) -> Any:
    """Return the adapter's output [tokens, hidden] for the normed hidden states z."""
    import torch

    return (torch.nn.functional.silu(z @ parts["gate"].T) * (z @ parts["up"].T)) @ parts["down"].T


def _predictor(tensors: Tensors, contract: Mod, layer: int, hidden: int) -> Parts:
    if contract.decision.rule != "predictor":
        return {}
    prefix = f"model.layers.{layer}.mod_predictor."
    first = prefix + "fc1.bias"
    width = tensors.shape(first)[0] if first in tensors.names else 0
    shapes: dict[str, tuple[int, ...]] = {
        "fc1.bias": (width,),
        "fc1.weight": (width, hidden),
        "fc2.weight": (1, width),
        "fc2.bias": (1,),
    }
    return {f"predictor.{name}": _tensor(tensors, prefix + name, expected) for name, expected in shapes.items()}


def _read(
    tensors: Tensors, prefix: str, needed: dict[str, tuple[int, ...]], optional: dict[str, tuple[int, ...]]
) -> Parts:
    found = {name: shape for name, shape in optional.items() if prefix + name in tensors.names}
    return {name: _tensor(tensors, prefix + name, shape) for name, shape in (needed | found).items()}


def _tensor(tensors: Tensors, name: str, expected: tuple[int, ...]) -> Any:
    import torch

    return torch.from_numpy(read_router_tensor(tensors, name, expected))


def _width(tensors: Tensors, name: str) -> int:
    """Return the first size of a matrix; 0 where it is absent, which is reported when it is read."""
    return tensors.shape(name)[0] if name in tensors.names else 0


__all__ = ["Parts", "adapted", "read_adapter", "read_router", "score_of"]
