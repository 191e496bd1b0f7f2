"""The file that Triton loads, with a stand-in for Triton's module: what each request is sent, and in which order."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import skip_bundle  # noqa: F401

from dynexport.exporter.triton.repository import export
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.model import load

Array = np.ndarray
FINAL = 1


class Error(Exception):
    """Triton's error of a response."""

    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = "INVALID_ARG", "INTERNAL", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Sender:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.cancelled, self.broken = False, False
        self.ended, self.begun = threading.Event(), threading.Event()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Any = None, flags: int = 0) -> None:
        if self.broken:
            raise RuntimeError("broken")
        assert not self.ended.is_set(), "nothing comes after the end"
        if response is not None:
            self.sent.append(response)
            self.begun.set()
        if flags == FINAL:
            self.ended.set()

    def ids(self) -> list[int]:
        assert self.ended.wait(20)
        return [token for response in self.sent for token in response.outputs["output_ids"].tolist()]

    def error(self) -> tuple[str, str]:
        assert self.ended.wait(20)
        return self.sent[-1].error.code, str(self.sent[-1].error)


class Metrics:
    """Metrics by name and labels."""

    GAUGE, COUNTER = "gauge", "counter"
    values: dict[tuple[str, str], float] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name = name

    def Metric(self, labels: dict[str, str]) -> Any:
        key = self._name, labels.get("finished_reason", "")
        self.values[key] = 0.0
        return SimpleNamespace(
            set=lambda value: self.values.update({key: value}),
            increment=lambda value: self.values.update({key: self.values[key] + value}),
        )


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``triton_python_backend_utils``."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.TritonError, module.TritonModelException = Error, type("TritonModelException", (Exception,), {})
    module.MetricFamily, module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = Metrics, FINAL
    module.Logger = SimpleNamespace(log_warn=lambda text: None)
    module.Tensor = lambda name, values: (name, values)
    module.InferenceResponse = lambda outputs=(), error=None: SimpleNamespace(outputs=dict(outputs), error=error)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delitem(sys.modules, "dynexport.exporter.triton.model", raising=False)
    return module


def request(sender: Sender, timeout: int = 0, parameters: str = "{}", **given: Any) -> Any:
    def values(value: Any) -> Array:
        listed = value if isinstance(value, list) else [value]
        return np.array([each.encode() if isinstance(each, str) else each for each in listed])

    tensors = {"stream": True, "temperature": np.float32(0), **given}
    inputs = [SimpleNamespace(name=lambda n=n: n, as_numpy=lambda v=v: values(v)) for n, v in tensors.items()]
    return SimpleNamespace(
        get_response_sender=lambda: sender,
        inputs=lambda: inputs,
        parameters=lambda: parameters,
        timeout=lambda: timeout,
    )


@pytest.fixture
def loaded(triton: ModuleType, skip_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:  # noqa: F811
    """Starts a model with settings."""
    started = []

    def start(**settings: str) -> Any:
        place = export(Bundle.open(skip_bundle), tmp_path, "small", settings, link=True, force=True)
        model = importlib.import_module("dynexport.exporter.triton.model").TritonPythonModel()
        config = {"parameters": {name: {"string_value": text} for name, text in {"threads": "1", **settings}.items()}}
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(place),
                "model_version": "1",
                "model_name": "small",
            }
        )
        started.append(model)
        return model

    yield start
    for model in started:
        model.finalize()


def test_requests_run_together_and_end_once(loaded: Callable[..., Any], skip_bundle: Path) -> None:  # noqa: F811
    model, senders = loaded(chunk="4"), [Sender() for _ in range(3)]
    prompts = ["one", "and two", "this is three"]
    model.execute([request(s, text_input=p, max_tokens=9) for s, p in zip(senders, prompts, strict=True)])
    alone = load(skip_bundle, threads=1)
    for sender, prompt in zip(senders, prompts, strict=True):
        assert sender.ids() == alone.generate(prompt, max_new_tokens=9, chunk=4).ids
        assert len(sender.sent) > 1


def test_without_stream_all_is_one_response(loaded: Callable[..., Any]) -> None:
    sender = Sender()
    loaded().execute([request(sender, text_input="one", max_tokens=7, stream=False)])
    assert len(sender.ids()) == 7 and len(sender.sent) == 1
    assert sender.sent[0].outputs["completion_tokens"].tolist() == [7]


def hold(model: Any, sender: Sender, until: Callable[[], bool]) -> None:
    """Let a model's steps wait from a request's first response on; not when the model is unloaded."""
    step = model._worker.scheduler.step

    def held() -> None:
        while sender.begun.is_set() and not until() and not model._worker.problem:
            time.sleep(0.001)
        step()

    model._worker.scheduler.step = held


def test_a_cancelled_request_ends(loaded: Callable[..., Any]) -> None:
    model, sender, works = loaded(), Sender(), []
    submit = model._worker.submit
    model._worker.submit = lambda work: (works.append(work), submit(work))
    hold(model, sender, lambda: works[0].cancelled)
    model.execute([request(sender, text_input="a", max_tokens=250, temperature=np.float32(1), seed=1)])
    assert sender.begun.wait(20)
    sender.cancelled = True
    assert sender.error()[0] == "CANCELLED"
    assert Metrics.values["vllm:num_requests_running", ""] == 0


def test_a_broken_stream_does_not_stop_the_others(loaded: Callable[..., Any]) -> None:
    model, broken, good = loaded(), Sender(), Sender()
    broken.broken = True
    model.execute([request(broken, text_input="a", max_tokens=200), request(good, text_input="b", max_tokens=5)])
    assert len(good.ids()) == 5


@pytest.mark.parametrize(
    "given, code, message",
    [
        ({"text_input": "a", "depth": "9"}, "INVALID_ARG", "depth: expected one of full, 2, found 9"),
        ({"text_input": "a", "parameters": '{"max_token": 3}'}, "INVALID_ARG", "parameters: expected inputs"),
        ({"text_input": b"\xff"}, "INVALID_ARG", "text_input: expected UTF-8 text"),
        ({"text_input": "a", "max_tokens": [1, 2]}, "INVALID_ARG", "max_tokens: expected one value, found 2"),
        ({"text_input": "a", "max_tokens": 250, "timeout": 1000}, "UNAVAILABLE", "the request reached its time limit"),
    ],
)
def test_errors(loaded: Callable[..., Any], given: dict[str, Any], code: str, message: str) -> None:
    sender = Sender()
    loaded().execute([request(sender, **given)])
    found = sender.error()
    assert found[0] == code and found[1].startswith(f"{code}: {message}")


def test_finalize_lets_requests_finish_or_ends_them(loaded: Callable[..., Any]) -> None:
    for seconds, whole in (("20", True), ("0", False)):
        model, sender = loaded(drain_seconds=seconds), Sender()
        hold(model, sender, lambda: False)
        model.execute([request(sender, text_input="a", max_tokens=200, temperature=np.float32(1), seed=1)])
        assert sender.begun.wait(20)
        model.finalize()
        assert sender.ended.is_set()
        assert (sender.sent[-1].error is None) == whole
        late = Sender()
        model.execute([request(late, text_input="a")])
        assert late.error()[0] == "UNAVAILABLE"


def test_settings_that_are_wrong_stop_the_loading(loaded: Callable[..., Any], triton: Any) -> None:
    with pytest.raises(triton.TritonModelException, match="threads: expected a whole number, found 'many'"):
        loaded(threads="many")
