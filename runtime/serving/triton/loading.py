"""Load a bundle with the settings of a model's config.pbtxt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import available_cores
from dynexport.runtime.engines.registry import RUN_BACKENDS, RunBackend
from dynexport.runtime.generation.generation_config import Recommended, recommended_by
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.triton.fields import SETTINGS
from dynexport.runtime.serving.watch import Watch
from dynexport.runtime.serving.worker import Worker

_MOST_SECONDS = 3600


@dataclass(frozen=True)
class ModelSettings:
    """The settings of a model, read.

    Attributes:
        backend: what runs the graphs.
        threads: threads of ONNX Runtime.
        scheduler: sizes and bounds.
        drain_seconds: how long running requests may go on when the model is unloaded.
    """

    backend: RunBackend
    threads: int
    scheduler: Settings
    drain_seconds: float


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        worker: the thread that runs its requests; not started.
        recommended: its author's sampling options, for inputs that a request does not give.
        drain_seconds: as for ``ModelSettings``.
    """

    worker: Worker
    recommended: Recommended
    drain_seconds: float


def load(bundle: str | Path, parameters: Mapping[str, Any], watch: Watch | None = None) -> Loaded:
    """Load a bundle.

    Args:
        bundle: the bundle's directory.
        parameters: the field ``parameters`` of the model's configuration, as JSON has it:
            ``{"threads": {"string_value": "2"}, ..}``. Names in capitals are Triton's own and ignored.
        watch: receives what the worker does.

    Raises:
        DynexportError: for a bundle that cannot run here, or a setting that is unknown or out of its range.
    """
    given = {name: value["string_value"] for name, value in parameters.items() if not name.isupper()}
    settings = read_settings(given)
    model = Model(Bundle.open(bundle), settings.threads, backend=settings.backend)
    worker = Worker(model, settings.scheduler, watch)
    return Loaded(worker, recommended_by(model.bundle), settings.drain_seconds)


def read_settings(given: Mapping[str, str]) -> ModelSettings:
    """Read settings from text; those that are not given, or empty, have their defaults.

    Raises:
        DynexportError: for a setting that is unknown or out of its range.
    """
    texts = {setting.name: setting.default for setting in SETTINGS}
    for name, text in given.items():
        if name not in texts:
            raise DynexportError(f"parameters: expected some of {', '.join(texts)}, found {name:.40}")
        texts[name] = text or texts[name]
    backend = next((name for name in RUN_BACKENDS if name == texts["backend"]), None)
    if backend is None:
        raise DynexportError(f"backend: expected one of {', '.join(RUN_BACKENDS)}, found {texts['backend']:.40}")
    scheduler = Settings(
        rows=_count(texts, "max_rows"),
        tokens=_count(texts, "max_length") if texts["max_length"] else None,
        chunk=_count(texts, "chunk"),
        queue=_count(texts, "queue"),
        prefix_bytes=_count(texts, "prefix_bytes", 0),
    )
    threads = _count(texts, "threads") if texts["threads"] else available_cores()
    return ModelSettings(backend, threads, scheduler, _seconds(texts["drain_seconds"]))


def _count(texts: Mapping[str, str], name: str, least: int = 1) -> int:
    text = texts[name]
    whole = re.fullmatch(r"-?[0-9]{1,15}", text)
    if whole is None:
        raise DynexportError(f"{name}: expected a whole number, found {text!r:.40}")
    return checked_count(name, int(text), least)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MOST_SECONDS:
        raise DynexportError(f"drain_seconds: expected a number from 0 to {_MOST_SECONDS}, found {text!r:.40}")
    return seconds


__all__ = ["Loaded", "ModelSettings", "load", "read_settings"]
