"""A baseline, timed in a process of its own: two engines in one process would take the cores from each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.measure.timed_run import Runner, Sizes, Timed

Array = np.ndarray
_START = "from dynexport.runtime.measure.twin import main; main()"
# Sizes that make two bundles the same model; parameters are not among them, as routers have some of their own.
_SIZES = ("family", "layers", "hidden_size", "heads", "kv_heads", "head_dim", "vocab_size")
# Fields of a config.json that say nothing about what the model computes with every layer for every token.
_IRRELEVANT = frozenset({"dynexport", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


class _Job(BaseModel):
    """What to load and to run, the first line that comes on standard input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    sizes: Sizes
    prompts: list[list[int]]


class Twin:
    """A process that holds a bundle without routers, and runs it when it is asked to; idle in between.

    Raises:
        DynexportError: where it cannot be loaded.
    """

    def __init__(self, bundle: Bundle, sizes: Sizes, prompts: Array) -> None:
        self._process = subprocess.Popen(
            # -P: what lies in the working directory is nobody's module.
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is ours, and we end it
        )
        try:
            job = _Job(bundle=bundle.path.absolute(), sizes=sizes, prompts=prompts.tolist())
            self._ask(job.model_dump_json())
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def run(self) -> Timed:
        """Time the prompts and the steps."""
        return Timed.model_validate(self._ask("run"))

    def operators(self) -> tuple[float, dict[str, float]]:
        """Of a step after the last prompt, as ``operator_times``."""
        share, operators = self._ask("operators")
        return share, operators

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise DynexportError(
                f"baseline: the process that runs it ended with code {self._process.wait()}; is there enough memory?"
            )
        found = json.loads(answer)
        if "error" in found:
            raise DynexportError(f"baseline: {found['error']}")
        return found["result"]

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Load and run what comes on standard input; a line of JSON on standard output for each line."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between our lines
    runner: Runner | None = None
    for line in sys.stdin:
        result: Any = None
        try:
            if runner is None:
                job = _Job.model_validate_json(line)
                runner = Runner(Bundle.open(job.bundle), job.sizes)
                runner.warm_up(np.array(job.prompts, np.int64))
            elif line.strip() == "operators":
                result = runner.operators()
            else:
                result = runner.run().model_dump()
        except DynexportError as error:
            channel.write(json.dumps({"error": str(error)}) + "\n")
        else:
            channel.write(json.dumps({"result": result}) + "\n")


def check_twin(bundle: Bundle, baseline: Bundle, sizes: Sizes) -> None:
    """Raise DynexportError for a baseline that is not the same model with every layer for every token."""
    checked_kind("baseline", baseline, Bundle, "an opened Bundle (Bundle.open)")
    ours, other = bundle.manifest, baseline.manifest
    if other.routing is not None:
        raise DynexportError(
            f"baseline: {baseline.path}: strategy: expected one without routers, which runs every layer for every "
            f"token, found {other.contract.strategy}; convert the model with --strategy dense"
        )
    if sizes.slots > other.model.max_length:
        raise DynexportError(
            f"baseline: {baseline.path}: expected a context of {sizes.slots} tokens, found {other.model.max_length}"
        )
    for name, expected, found in _compared(ours, other):
        if expected != found:
            raise DynexportError(
                f"baseline: {baseline.path}: {name}: expected {shown(expected)} as in {bundle.path}, found "
                f"{shown(found)}; name a bundle of the same model"
            )


def _compared(ours: Manifest, other: Manifest) -> list[tuple[str, Any, Any]]:
    """Name, value and the other's value of all that has to be the same."""
    pairs = [(name, getattr(ours, name), getattr(other, name)) for name in ("target", "precision")]
    pairs += [(name, getattr(ours.model, name), getattr(other.model, name)) for name in _SIZES]
    pairs += [("FLOPs of a layer", ours.cost.layer_flops, other.cost.layer_flops)]
    pairs += [("bytes of the head", ours.cost.shared, other.cost.shared)]
    if ours.source.importer == other.source.importer:  # an importer writes fields of its own
        mine, its = ours.source.config, other.source.config
        names = sorted((mine.keys() | its.keys()) - _IRRELEVANT)
        pairs += [(f"config.json: {name}", mine.get(name), its.get(name)) for name in names]
    return pairs


__all__ = ["Twin", "check_twin", "main"]
