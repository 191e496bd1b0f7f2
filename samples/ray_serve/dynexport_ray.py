"""Serve bundles with Ray Serve: replicas of dynexport's HTTP server behind one address.

``serve run config.yaml`` deploys it; README.md explains the options.
"""

# Without `from __future__ import annotations`: Ray reads the annotation of `build`, which must be the class.
import logging
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from dynexport.runtime import Bundle, Model
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.serving.http.app import create_app
from dynexport.runtime.serving.http.served import Directory, Served
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.worker import Worker

# Ray's name for its loggers: what is logged here is in the log of the replica.
_LOG = logging.getLogger("ray.serve")
# Sends requests with the same header X-Session-Id to the same replica.
_STICKY = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


class Arguments(BaseModel):
    """The arguments of the app: ``args`` in config.yaml. Each replica has the same.

    Attributes:
        bundles: the bundles' directories, which exist on every node, by the models' names.
        threads: number of threads of each bundle.
        max_rows: most answers of a bundle that run at a time.
        max_length: most tokens of a prompt and its answer; None for the model's context.
        prefix_bytes: memory for known prefixes of each bundle, in bytes.
        request_seconds: most seconds for a request, waiting included.
        api_key_file: a file with API keys, one per line; None lets everybody in.
        backend: the engine.
        trust_engines: true loads the bundle's built engines, as ``--trust-engines`` does.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: dict[str, Path] = Field(min_length=1)
    threads: int = Field(default=1, ge=1)
    max_rows: int = Field(default=8, ge=1)
    max_length: int | None = None
    prefix_bytes: int = 256 << 20
    request_seconds: float = 600
    api_key_file: Path | None = None
    backend: RunBackend = "onnxruntime"
    trust_engines: bool = False


class Replica:
    """A replica: dynexport's app and the worker of each bundle.

    Args:
        arguments: the arguments of the app.

    Attributes:
        workers: the workers by the models' names.
    """

    def __init__(self, arguments: Arguments) -> None:
        settings = Settings(arguments.max_rows, arguments.max_length, prefix_bytes=arguments.prefix_bytes)
        self.workers = {
            name: Worker(
                Model(
                    Bundle.open(path, trust_engines=arguments.trust_engines),
                    arguments.threads,
                    backend=arguments.backend,
                ),
                settings,
                on_failure=_LOG.error,
            )
            for name, path in arguments.bundles.items()
        }
        self._http = HttpSettings(request_seconds=arguments.request_seconds, keys=_keys(arguments.api_key_file))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return dynexport's app; Ray starts and ends it with the replica, and the app its workers."""
        models = {name: Served.of(name, worker) for name, worker in self.workers.items()}
        return create_app(Directory(models), self._http, report=_LOG.error)

    def check_health(self) -> None:
        """Raise RuntimeError if a worker is not ready; Ray replaces a replica that fails three times in a row."""
        problems = [f"{name}: {worker.problem}" for name, worker in self.workers.items() if worker.problem]
        if problems:
            raise RuntimeError("; ".join(problems))

    def load(self) -> dict[str, Any]:
        """Return the replica's id and process, and the numbers of answers that run and of requests that wait."""
        schedulers = [worker.scheduler for worker in self.workers.values()]
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "process": os.getpid(),
            "running": sum(scheduler.running for scheduler in schedulers),
            "waiting": sum(scheduler.waiting for scheduler in schedulers),
        }


DEPLOYMENT = serve.deployment(
    name="dynexport",
    request_router_config=RequestRouterConfig(request_router_class=_STICKY),
    max_queued_requests=256,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=60,
)(serve.ingress()(Replica))


def build(arguments: Arguments) -> Application:
    """Return the app that Ray Serve deploys.

    A replica accepts twice as many requests as it has rows, so that rows are never idle. The next ones go to another
    replica, or wait in Ray's proxy. config.yaml overrides these options.
    """
    return DEPLOYMENT.options(
        ray_actor_options={"num_cpus": arguments.threads * len(arguments.bundles)},
        max_ongoing_requests=2 * arguments.max_rows * len(arguments.bundles),
    ).bind(arguments)


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file. Raises ValueError for a file without keys."""
    keys = () if path is None else tuple(path.read_text(encoding="ascii").split())
    if path is not None and not keys:
        raise ValueError(f"{path}: expected API keys, one per line, found none")
    return keys
