"""Tiny bundles, converted once a session, and ways to damage a copy of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import MANIFEST, WEIGHTS, File, Manifest

ConvertOnce = Callable[..., Bundle]
Damage = Callable[[Bundle, str], Bundle]


@pytest.fixture(scope="session")
def convert_once(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> ConvertOnce:
    """The bundle of a tiny model of a family; skipping takes the layers 0 and 3 of 4."""

    @cache
    def make(
        family: str = "llama",
        strategy: str = "unified-skip",
        static: bool = False,
        precision: str = "fp32",
        target: str = "onnxruntime",
    ) -> Bundle:
        output = tmp_path_factory.mktemp("bundle") / "bundle"
        speedups = (2.0,) if strategy == "unified-skip" else ()
        convert(
            saved_model(family),
            output,
            strategy=strategy,
            speedups=speedups,
            static=static,
            precision=precision,  # type: ignore[arg-type]
            target=target,
        )
        return Bundle.open(output)

    return make


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    """A copy of a bundle with one weight changed, and hashes that agree with it."""

    def change(bundle: Bundle, tensor: str) -> Bundle:
        copy = tmp_path / "damaged"
        shutil.copytree(bundle.path, copy)
        graph = onnx.load(copy / bundle.manifest.graphs[0].file, load_external_data=False).graph
        stored = next(value for value in graph.initializer if value.name == tensor)
        place = {entry.key: entry.value for entry in stored.external_data}
        shape = tuple(stored.dims)
        weight = np.memmap(copy / WEIGHTS, np.float32, "r+", offset=int(place["offset"]), shape=shape)
        weight *= 1 + 0.3 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        weight.flush()
        files = bundle.manifest.files | {WEIGHTS: File.of(copy / WEIGHTS)}
        manifest: Manifest = bundle.manifest.model_copy(update={"files": files})
        (copy / MANIFEST).write_text(manifest.model_dump_json())
        return Bundle.open(copy)

    return change
