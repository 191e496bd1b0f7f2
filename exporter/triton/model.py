"""A dynexport bundle in Triton's Python backend: many requests at a time on the rows of one KV cache.

``dynexport export-triton`` copies this file into the model repository as 1/model.py, where Triton finds it. It needs
dynexport in the Python that Triton's backend runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import triton_python_backend_utils as pb

from dynexport.runtime.bundle.errors import DynexportError, one_line
from dynexport.runtime.serving.triton.asking import Call, read
from dynexport.runtime.serving.triton.fields import INPUTS
from dynexport.runtime.serving.triton.loading import load
from dynexport.runtime.serving.triton.metrics import Counts, TritonMetrics
from dynexport.runtime.serving.work import Delivery
from dynexport.runtime.serving.worker import Closed, QueueFull

# Seconds between two looks for requests that clients have cancelled, and between two updates of the metrics.
_LOOK = 0.05
_CODES = {"cancelled": "CANCELLED", "timeout": "UNAVAILABLE", "closed": "UNAVAILABLE", "failed": "INTERNAL"}


class TritonPythonModel:
    """One model: a worker runs its requests, and a thread sends the responses."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that lies beside this file."""
        config = json.loads(args["model_config"])
        bundle = Path(args["model_repository"], args["model_version"], "bundle")
        self._counts = Counts()
        try:
            self._loaded = load(bundle, config.get("parameters", {}), self._counts)
        except DynexportError as error:
            raise pb.TritonModelException(str(error)) from error
        self._worker = self._loaded.worker
        self._metrics = TritonMetrics(pb, args["model_name"], self._counts, self._worker)
        # What the sending thread is told: a call and its sender, and what was delivered for it; None to end.
        self._inbox: SimpleQueue[tuple[Call, Any, Delivery | None] | None] = SimpleQueue()
        self._sending = Thread(target=self._send_all, name="dynexport-sender", daemon=True)
        self._sending.start()
        self._worker.start()

    def execute(self, requests: list[Any]) -> None:
        """Submit requests; their responses come from the sending thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except (Closed, QueueFull) as error:
                _end(sender, "UNAVAILABLE", str(error))
            except DynexportError as error:
                _end(sender, "INVALID_ARG", str(error))
            except Exception as error:
                _end(sender, "INTERNAL", f"{type(error).__name__}: {error}")

    def finalize(self) -> None:
        """Let running requests finish for some seconds, then end them."""
        self._worker.close(self._loaded.drain_seconds)
        self._inbox.put(None)
        self._sending.join()

    def _submit(self, request: Any, sender: Any) -> None:
        for name in json.loads(request.parameters() or "{}"):
            if not name.startswith("triton_"):  # those are Triton's own
                raise DynexportError(f"parameters: expected inputs {', '.join(t.name for t in INPUTS)}, found {name}")
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        call = read(self._loaded, tensors, request.timeout() / 1e6 or None)
        call.work.deliver = lambda delivery: self._inbox.put((call, sender, delivery))
        self._worker.submit(call.work)
        self._inbox.put((call, sender, None))

    def _send_all(self) -> None:
        """Send responses until told to end, and look for cancelled requests in between."""
        running: dict[Call, Any] = {}
        looked = time.monotonic()
        while True:
            try:
                item = self._inbox.get(timeout=_LOOK if running else None)
                if item is None:
                    return
                self._take(running, *item)
            except Empty:
                pass
            if not running or time.monotonic() - looked >= _LOOK:
                for call, sender in running.items():
                    call.work.cancelled |= sender.is_cancelled()
                self._metrics.publish()
                looked = time.monotonic()

    def _take(self, running: dict[Call, Any], call: Call, sender: Any, delivery: Delivery | None) -> None:
        """Send what was delivered for a call, and keep the list of running ones."""
        if delivery is None:
            if not call.done:
                running[call] = sender
            return
        self._counts.delivered(delivery)
        outputs = call.response(delivery)
        try:
            if outputs is not None:
                sender.send(pb.InferenceResponse([pb.Tensor(name, values) for name, values in outputs.items()]))
            if delivery.failure is not None:
                _end(sender, _CODES[delivery.failure.reason], delivery.failure.message)
            elif delivery.done:
                sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # this client's stream is broken; the others' go on
            call.work.cancelled = True
            pb.Logger.log_warn(one_line(f"a response was not sent: {error}"))
        if delivery.done:
            running.pop(call, None)


def _end(sender: Any, code: str, message: str) -> None:
    """End a request with an error: INVALID_ARG for the request's own fault, other codes for the server's.

    The message begins with the code, as Triton's HTTP answers have status 400 for all of them.
    """
    error = pb.TritonError(one_line(f"{code}: {message}"), getattr(pb.TritonError, code))
    sender.send(pb.InferenceResponse(error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
