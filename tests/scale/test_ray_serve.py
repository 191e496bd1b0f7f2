"""The Ray Serve sample: `serve run` with the sample's own config on a local Ray, as OpenAI's client sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from bundles import talking_checkpoint
from local_ray import SAMPLE, local_ray  # before ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from dynexport.exporter import convert
from dynexport.runtime import Bundle, Model
from dynexport.runtime.serving.submit import answers, make_work

sys.path.append(str(SAMPLE))

from dynexport_ray import DEPLOYMENT, Arguments, Replica

CHUNK, ROWS = 32, 2
# Tokens of answers that take a second or two, and half a minute: clients hang up before their ends.
LONG, ENDLESS = 2000, 30_000


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("scaled")
    checkpoint = talking_checkpoint(home / "model", max_position_embeddings=ENDLESS + 100)
    convert(checkpoint, home / "small", speedups=[2.0], golden=False)
    return home / "small"


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Model(Bundle.open(bundle), threads=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with local_ray(cpus=4) as address:
        yield address


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def handle(
    cluster: str, bundle: Path, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DeploymentHandle]:
    """The app of config.yaml with a small bundle, deployed by `serve run`."""
    config = yaml.safe_load((SAMPLE / "config.yaml").read_text())
    config["http_options"]["port"] = port
    (app,) = config["applications"]
    app["args"] |= {"bundles": {"small": str(bundle)}, "threads": 1, "max_rows": ROWS}
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    words = [Path(sys.executable).with_name("serve"), "run", "--address", cluster, "--app-dir", SAMPLE, path]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            until(lambda: status() == ("RUNNING", {"RUNNING": 2}))
            yield serve.get_app_handle("dynexport")
        finally:
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 0


def status() -> tuple[str, dict[str, int]]:
    """The state of the app, and the number of its replicas by their states."""
    found = serve.status().applications.get("dynexport")
    if found is None or "dynexport" not in found.deployments:
        return "", {}
    return found.status.value, dict(found.deployments["dynexport"].replica_states)


def load(handle: DeploymentHandle, session: str) -> dict[str, Any]:
    """The load of the replica that a session's requests go to."""
    found: dict[str, Any] = handle.options(session_id=session).load.remote().result(timeout_s=10)
    return found


@pytest.fixture
def sessions(handle: DeploymentHandle) -> tuple[str, str]:
    """Two sessions whose requests go to different replicas."""
    at = {load(handle, session)["replica"]: session for session in map(str, range(20))}
    first, second = at.values()
    return first, second


def client(port: int, session: str | None = None, prefix: str = "") -> openai.OpenAI:
    headers = {} if session is None else {"X-Session-Id": session}
    address = f"http://127.0.0.1:{port}{prefix}/v1"
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, default_headers=headers, timeout=60)


def test_streamed_texts_are_what_the_model_generates_alone(handle: DeploymentHandle, model: Model, port: int) -> None:
    async def ask(asking: openai.AsyncOpenAI, prompt: str, name: str) -> str:
        stream = await asking.completions.create(model=name, prompt=prompt, max_tokens=40, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_at_once(asked: list[tuple[str, str]]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60) as asking:
            return await asyncio.gather(*(ask(asking, *one) for one in asked))

    asked = [(f"prompt {number} " * (1 + 3 * number), name) for number in range(4) for name in ("small", "small@2")]
    for (prompt, name), text in zip(asked, asyncio.run(all_at_once(asked)), strict=True):
        depth = name.partition("@")[2] or None
        assert text == model.generate(prompt, max_new_tokens=40, chunk=CHUNK, depth=depth).text


def test_a_conversation_stays_with_the_replica_that_knows_its_prefix(
    handle: DeploymentHandle, sessions: tuple[str, str], port: int
) -> None:
    def known(session: str, talk: str) -> int:
        messages: Any = [{"role": "user", "content": f"This is talk {talk}. " * 8}]
        answer = client(port, session).chat.completions.create(model="small", messages=messages, max_tokens=1)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    first, second = sessions
    assert [known(first, "a"), known(second, "b")] == [0, 0]
    for _ in range(3):
        assert known(first, "a") > 0 and known(second, "b") > 0
    assert known(second, "a") == 0  # the other replica has not seen it


def test_a_client_that_hangs_up_frees_its_row(handle: DeploymentHandle, sessions: tuple[str, str], port: int) -> None:
    session = sessions[0]
    asking = client(port, session)
    with asking.completions.create(
        model="small", prompt="hello", max_tokens=ENDLESS, temperature=0, stream=True
    ) as stream:
        next(iter(stream))
        assert load(handle, session)["running"] == 1
        assert load(handle, sessions[1])["running"] == 0
    until(lambda: load(handle, session)["running"] == 0, 5)
    with pytest.raises(openai.APITimeoutError):
        asking.with_options(timeout=0.5).completions.create(model="small", prompt="hello", max_tokens=ENDLESS)
    until(lambda: load(handle, session)["running"] == 0, 5)


def test_errors_have_the_form_of_openai(handle: DeploymentHandle, port: int) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client(port).completions.create(model="another", prompt="hello")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client(port).completions.create(model="small", prompt="hello", max_tokens=-1)
    assert bad.value.param == "max_tokens"


def test_a_replica_that_dies_is_replaced(handle: DeploymentHandle, sessions: tuple[str, str], port: int) -> None:
    dead = load(handle, sessions[0])
    os.kill(dead["process"], signal.SIGKILL)
    other = client(port, sessions[1]).completions.create(model="small", prompt="hello", max_tokens=2)
    assert other.choices[0].text
    until(lambda: status()[1] != {"RUNNING": 2})
    until(lambda: status() == ("RUNNING", {"RUNNING": 2}))
    assert dead["replica"] not in {load(handle, str(number))["replica"] for number in range(20)}


@pytest.fixture(scope="module")
def growing(handle: DeploymentHandle, bundle: Path) -> Iterator[str]:
    """The prefix of a second app: one replica for each request, two at most, and no more than one request waits."""
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 0.1,
        "metrics_interval_s": 0.1,
        "look_back_period_s": 0.2,
    }
    deployment = DEPLOYMENT.options(autoscaling_config=scaling, max_ongoing_requests=1, max_queued_requests=1)
    arguments = Arguments(bundles={"small": bundle}, max_rows=1)
    serve.run(deployment.bind(arguments), name="growing", route_prefix="/growing")
    yield "/growing"
    serve.delete("growing")


def test_waiting_requests_start_a_replica_and_too_many_are_refused(growing: str, port: int) -> None:
    asking = client(port, prefix=growing)
    hello: Any = {"model": "small", "prompt": "hello", "temperature": 0}
    with asking.completions.create(**hello, max_tokens=ENDLESS, stream=True), ThreadPoolExecutor() as pool:
        waiting = pool.submit(asking.completions.create, **hello, max_tokens=2)
        time.sleep(0.2)
        with pytest.raises(openai.RateLimitError) as refused:
            asking.completions.create(**hello, max_tokens=2)
        assert refused.value.response.headers["Retry-After"] == "1"
        assert waiting.result().choices[0].text
    until(lambda: serve.status().applications["growing"].deployments["dynexport"].replica_states == {"RUNNING": 2})


def test_running_answers_end_before_a_replica_goes(growing: str, model: Model, port: int) -> None:
    asking = client(port, prefix=growing)
    with asking.completions.create(model="small", prompt="bye", max_tokens=LONG, temperature=0, stream=True) as stream:
        first = next(iter(stream))
        serve.delete("growing")
        rest = list(stream)
    expected = model.generate("bye", max_new_tokens=LONG, chunk=CHUNK)
    assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest) == expected.text
    assert rest[-1].choices[0].finish_reason == expected.finish_reason


def test_a_replica_is_healthy_while_its_workers_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(Arguments(bundles={"small": bundle}))
    worker = replica.workers["small"]
    with pytest.raises(RuntimeError, match="small: the worker has not started"):
        replica.check_health()
    worker.start()
    replica.check_health()
    monkeypatch.setattr(worker.scheduler, "step", lambda: 1 // 0)
    assert [delivery.failure is None for delivery in answers(worker, make_work(worker.model, "hello"))] == [False]
    with pytest.raises(RuntimeError, match=r"small: .*the worker stopped: ZeroDivisionError"):
        replica.check_health()


def test_api_keys_are_asked_for(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="expected API keys"):
        Replica(Arguments(bundles={"small": bundle}, api_key_file=tmp_path / "keys"))
