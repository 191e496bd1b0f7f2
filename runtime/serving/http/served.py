"""The models of a server, found by name, with an optional depth behind it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.generation_config import Recommended, recommended_by
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.errors import ApiError
from dynexport.runtime.serving.submit import wanted_depth
from dynexport.runtime.serving.worker import Worker

_BETWEEN = "@"


@dataclass(frozen=True)
class Served:
    """A served model.

    Attributes:
        name: its name.
        worker: the thread that runs its requests.
        recommended: its author's sampling options, for fields that a request does not give.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    worker: Worker
    recommended: Recommended
    created: int

    @classmethod
    def of(cls, name: str, worker: Worker) -> Served:
        """Return a model with the sampling options of its bundle. Raises DynexportError for unusable ones."""
        return cls(name, worker, recommended_by(worker.model.bundle), int(time.time()))

    @property
    def model(self) -> Model:
        """The loaded bundle."""
        return self.worker.model

    def described(self) -> list[dict[str, Any]]:
        """Return its entries in the list of models: one for its name, and one with each depth behind it."""
        manifest = self.model.bundle.manifest
        depths = [
            {"name": depth.name, "ratio": depth.ratio, "layers": len(depth.keep), "trained": depth.trained}
            for depth in (manifest.full, *manifest.depths)
        ]
        entry = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dynexport",
            "max_model_len": self.worker.scheduler.tokens,
            "layers": manifest.model.layers,
            "depths": depths,
        }
        return [entry, *({**entry, "id": f"{self.name}{_BETWEEN}{depth['name']}"} for depth in depths)]


class Directory:
    """All models of a server.

    Args:
        models: served models by name.
    """

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = dict(models)

    def find(self, name: str, depth: str | float | None = None) -> tuple[Served, Depth]:
        """Return a model and the depth to run it at.

        Args:
            name: a model's name, or name@depth.
            depth: the request's own depth.

        Raises:
            ApiError: for an unknown model or one with an unknown depth, or two depths that differ.
            DynexportError: for an unknown depth of the request's own.
        """
        plain, _, suffix = name.rpartition(_BETWEEN)
        if name in self.models or plain not in self.models:
            plain, suffix = name, ""
        served = self.models.get(plain)
        if served is None:
            known = ", ".join(self.models)
            message = f"model: expected one of {known}, found {name:.80}"
            raise ApiError(404, message, param="model", code="model_not_found")
        try:
            by_name = wanted_depth(served.model, suffix or None)
        except DynexportError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        by_field = wanted_depth(served.model, depth)
        if suffix and depth is not None and by_field != by_name:
            raise ApiError(400, f"depth: expected {suffix}, as the model's name says, found {depth}", param="depth")
        return served, by_name if suffix else by_field


__all__ = ["Directory", "Served"]
