"""Parts of the benchmarks' checkpoints: router tensors with the contract's names, random tensors, files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]


def mod_routers(routed_layers: Iterable[int], hidden: int) -> Shapes:
    """Return name -> shape of one router in each of these layers, without predictors."""
    return {f"model.layers.{layer}.mod_router.weight": (1, hidden) for layer in routed_layers}


def radial_router(layers: int, hidden: int, units: int) -> Shapes:
    """Return name -> shape of a router over a pool of this number of layers; all hops share it, and it may exit."""
    name, choices = "model.radial_router.", layers + 1
    return {
        f"{name}norm.weight": (hidden,),
        f"{name}fc1.weight": (units, hidden),
        f"{name}fc1.bias": (units,),
        f"{name}fc2.weight": (choices, units),
        f"{name}fc2.bias": (choices,),
    }


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return float32 tensors, normal with a deviation of 0.02; equal shapes in equal order give equal numbers."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}


def save_checkpoint(directory: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write a Hugging Face directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
