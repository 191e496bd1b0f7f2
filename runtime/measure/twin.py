"""A bundle in its own process: two engines in one process would compete for the cores, and a start is timed there."""

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
from dynexport.runtime.measure.startup import StartClock, Startup
from dynexport.runtime.measure.timed_run import Runner, Sizes, Timed

Array = np.ndarray
_START = "from dynexport.runtime.measure.twin import main; main()"
# Sizes that two bundles of the same model share. The parameter count is not one: routers have parameters.
_SIZES = ("family", "layers", "hidden_size", "heads", "kv_heads", "head_dim", "vocab_size")
# Fields of config.json that do not change what the model computes at full depth.
_IRRELEVANT = frozenset({"dynexport", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


class _Job(BaseModel):
    """The bundle and prompts to load: the first line on standard input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    sizes: Sizes
    prompts: list[list[int]]


class Twin:
    """A process that holds a bundle and runs it on request, at full depth.

    Args:
        bundle: the bundle.
        sizes: sizes and settings of the runs.
        prompts: token ids of the prompts, int64 [rows, tokens].
        name: what the process is for, in error messages.

    Attributes:
        startup: times of its start.

    Raises:
        DynexportError: the bundle cannot be loaded.
    """

    def __init__(self, bundle: Bundle, sizes: Sizes, prompts: Array, *, name: str = "baseline") -> None:
        self._name = name
        self._process = subprocess.Popen(
            # -P: files of the working directory must not be imported as modules.
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a keyboard interrupt reaches this process only, which then ends the twin
        )
        try:
            job = _Job(bundle=bundle.path.absolute(), sizes=sizes, prompts=prompts.tolist())
            self.startup = Startup.model_validate(self._ask(job.model_dump_json()))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def run(self) -> Timed:
        """Run the prompts and the decode steps, and return their times."""
        return Timed.model_validate(self._ask("run"))

    def operators(self) -> tuple[float, dict[str, float]]:
        """Return ``operator_times`` of a decode step after the last prompts."""
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
                f"{self._name}: the process that runs it ended with code {self._process.wait()}; is there enough "
                "memory?"
            )
        found = json.loads(answer)
        if "error" in found:
            raise DynexportError(f"{self._name}: {found['error']}")
        return found["result"]

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Read requests from standard input and answer each with one line of JSON on standard output."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output that libraries print must not mix with the answers
    runner: Runner | None = None
    for line in sys.stdin:
        result: Any = None
        try:
            if runner is None:
                job = _Job.model_validate_json(line)
                clock, prompts = StartClock(job.bundle), np.array(job.prompts, np.int64)
                runner = Runner(Bundle.open(job.bundle), job.sizes)
                runner.load()
                clock.loaded()
                runner.first_token(prompts)
                result = clock.first_token().model_dump()
                runner.warm_up(prompts)
            elif line.strip() == "operators":
                result = runner.operators()
            else:
                result = runner.run().model_dump()
        except DynexportError as error:
            channel.write(json.dumps({"error": str(error)}) + "\n")
        else:
            channel.write(json.dumps({"result": result}) + "\n")


def check_twin(bundle: Bundle, baseline: Bundle, sizes: Sizes) -> None:
    """Raise DynexportError unless the baseline is the same model without routers."""
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
    """Return (name, value, the other's value) of everything that must be equal."""
    pairs = [(name, getattr(ours, name), getattr(other, name)) for name in ("target", "precision")]
    pairs += [(name, getattr(ours.model, name), getattr(other.model, name)) for name in _SIZES]
    pairs += [("FLOPs of a layer", ours.cost.layer_flops, other.cost.layer_flops)]
    pairs += [("FLOPs of layers", ours.cost.flops_of_layers, other.cost.flops_of_layers)]
    pairs += [("bytes of the head", ours.cost.shared, other.cost.shared)]
    if ours.source.importer == other.source.importer:  # every importer writes its own fields
        mine, its = ours.source.config, other.source.config
        names = sorted((mine.keys() | its.keys()) - _IRRELEVANT)
        pairs += [(f"config.json: {name}", mine.get(name), its.get(name)) for name in names]
    return pairs


__all__ = ["Twin", "check_twin", "main"]
