"""The trained samples generate in C++ what they generate in Python: 2,000 greedy tokens each, routes and overflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from house import ROOT
from mirrored import Mirrored, compare

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.text.text import Text

SAMPLES = sorted(path.name for path in (ROOT / "samples" / "training" / "checkpoints").iterdir())
PROMPTS = (
    "KING HENRY:\nOnce more unto the breach,",
    "First Citizen:\nBefore we proceed",
    "O Romeo, Romeo!",
    "To be, or not to be:",
    "What, ho!",
    "The quality of mercy is not",
    "Now is the winter",
    "Friends, Romans,",
)
STEPS = 2000 // len(PROMPTS)


@pytest.mark.parametrize("sample", SAMPLES)
def test_greedy_tokens_routes_and_overflow(sample: str, run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    convert(ROOT / "samples" / "training" / "checkpoints" / sample, path, precision="fp32", golden=False)
    bundle = Bundle.open(path)
    prompts = [Text.of_bundle(bundle).encode(prompt) for prompt in PROMPTS]
    on = Mirrored(Executor(bundle, threads=1), len(prompts), max(map(len, prompts)) + STEPS, record=True)
    rows, depth = on.run("acquire", count=len(prompts))["found"], bundle.depth(None).name
    found = on.run("run", rows=rows, tokens=prompts, phase="prompt", depths=[depth])["found"]
    for _ in range(STEPS):
        tokens = [best[-1:] for best in found["best"]]
        found = on.run("run", rows=rows, tokens=tokens, phase="decode", depths=[depth])["found"]
    compare(run, [on], tmp_path)
