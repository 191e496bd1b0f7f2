"""The process of chat templates: renders side by side, limits, crashes, and what is left behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import environment

from dynexport.runtime.text.render_process import RenderError, RenderProcess

TEMPLATES = {
    "echo": "{{ text }}",
    "long": "{{ 'x' * size }}",
    "endless": "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}",
    "wrong": "{% for %}",
}
SECRET = "the-secret-of-one-request"


OTHERS: set[int] = set()  # processes of other tests' templates


@pytest.fixture(autouse=True)
def others() -> None:
    OTHERS.clear()
    OTHERS.update(template_processes())


@pytest.fixture
def renders(others: None) -> Iterator[RenderProcess]:
    process = RenderProcess(TEMPLATES, 1)
    assert process.render("echo", {"text": "a"}) == "a"
    yield process
    del process
    gc.collect()


def pid(renders: RenderProcess) -> int:
    """The id of its process."""
    (found,) = template_processes() - OTHERS
    return found


def template_processes() -> set[int]:
    """The children of this process that render templates."""
    return {child for child in children(os.getpid()) if "template_process" in command_line(child)}


def children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def command_line(child: int) -> str:
    return Path(f"/proc/{child}/cmdline").read_text()


def soon(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_each_thread_gets_its_own_text(renders: RenderProcess) -> None:
    texts = [f"{number} " * (1 + number * 300) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: renders.render("echo", {"text": text}), texts)) == texts
    assert soon(lambda: not children(pid(renders))), "no fork is left, not as a zombie either"


def test_a_render_beyond_its_time_ends_alone(renders: RenderProcess) -> None:
    before, begun = pid(renders), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(renders.render, "endless", {"n": 99999})
        while not endless.done():
            assert renders.render("echo", {"text": "others go on"}) == "others go on"
        with pytest.raises(RenderError, match="it takes more than 1 s, or too much memory"):
            endless.result()
    assert time.monotonic() - begun < 25, "a limit of 1 s of CPU time"
    assert pid(renders) == before


@pytest.mark.parametrize(
    ("template", "variables", "expected"),
    [
        ("long", {"size": 10**10}, "it takes more than 1024 MiB of memory"),
        ("long", {"size": 2**25}, "it makes more than 16 Mi characters"),
        ("wrong", {}, "Expected an expression"),
    ],
)
def test_a_render_that_fails(renders: RenderProcess, template: str, variables: dict[str, int], expected: str) -> None:
    before = pid(renders)
    with pytest.raises(RenderError, match=expected):
        renders.render(template, variables)
    assert renders.render("echo", {"text": "b"}) == "b"
    assert pid(renders) == before


def test_a_killed_process_is_replaced(renders: RenderProcess) -> None:
    before = pid(renders)
    os.kill(before, signal.SIGKILL)
    assert soon(lambda: "template_process" not in command_line(before)), "it has ended"
    assert renders.render("echo", {"text": "b"}) == "b"
    assert pid(renders) != before
    assert not Path(f"/proc/{before}").exists(), "it is no zombie"


@pytest.mark.parametrize("delay", [0.0, 0.0001, 0.001, 0.01])
def test_a_render_while_the_process_is_killed_succeeds(renders: RenderProcess, delay: float) -> None:
    for number in range(5):
        os.kill(pid(renders), signal.SIGKILL)
        time.sleep(delay)
        assert renders.render("echo", {"text": str(number)}) == str(number)


def test_nothing_of_a_request_is_kept(renders: RenderProcess) -> None:
    """The next render is a fork of a process whose memory never held a request."""
    for _ in range(3):
        assert renders.render("echo", {"text": SECRET}) == SECRET
    assert in_memory(pid(renders), "CHARACTERS"), "its own names are found so"
    assert not in_memory(pid(renders), SECRET)


def in_memory(process: int, text: str) -> bool:
    """Whether a process' writable memory holds a text."""
    with Path(f"/proc/{process}/mem").open("rb") as memory:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            if found := re.match(r"(\w+)-(\w+) rw.*(?<!\[vvar\])$", line):
                begin, end = (int(number, 16) for number in found.groups())
                memory.seek(begin)
                if text.encode() in memory.read(end - begin):
                    return True
    return False


def test_it_ends_with_its_object() -> None:
    process = RenderProcess(TEMPLATES, 1)
    process.render("echo", {"text": "a"})
    child = pid(process)
    del process
    gc.collect()
    assert not Path(f"/proc/{child}").exists()


def test_it_ends_with_a_caller_that_is_killed() -> None:
    script = (
        "import os, sys, time\nfrom dynexport.runtime.text.render_process import RenderProcess\n"
        "renders = RenderProcess({'echo': '{{ text }}'}, 1)\n"
        "print(renders.render('echo', {'text': 'a'}), os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment()) as caller:
        assert caller.stdout is not None and caller.stdout.readline().startswith(b"a ")
        (child,) = children(caller.pid)
        caller.kill()
    assert soon(lambda: not Path(f"/proc/{child}").exists() or "template_process" not in command_line(child))


def test_a_fork_of_the_caller_has_its_own(renders: RenderProcess) -> None:
    before = pid(renders)
    if not (fork := os.fork()):
        try:
            assert renders.render("echo", {"text": "fork"}) == "fork"
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(fork, 0)[1] == 0
    assert renders.render("echo", {"text": "caller"}) == "caller"
    assert pid(renders) == before
