"""The command as a process: signals, closed pipes, terminals that cannot show a character, and no torch to run."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import command, environment


def test_interrupting_is_exit_code_130_without_a_traceback(skip_bundle: Path) -> None:
    arguments = command("bench", skip_bundle, "--repeats", 100_000, "--prompt-tokens", 8, "--threads", 1)
    waiting = "import sys; sys.argv = sys.argv[1:]\nfrom dynexport.runtime.measure import bench\n" + (
        "measure = bench.Mode.measure\n"
        "def told(*a):\n    print('measuring', flush=True)\n    return measure(*a)\n"
        "bench.Mode.measure = told\n"
        "from dynexport.exporter.cli.main import main\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", waiting, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error.strip()) == (130, "interrupted")


@pytest.mark.parametrize("arguments", [["run", "--ids", "1", "--max-new-tokens", "200"], ["inspect"]])
def test_a_reader_that_has_seen_enough(skip_bundle: Path, arguments: list[str]) -> None:
    words = command(arguments[0], skip_bundle, *arguments[1:])
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=30)) == (b"", 128 + signal.SIGPIPE)


@pytest.mark.parametrize(
    ("redirected", "expected"),
    [
        (">/dev/full", (2, "error: standard output: expected a place to write, found: No space left on device\n")),
        (">&- <&-", (2, "error: standard output: expected a place to write, found it closed; redirect it to ")),
        ("--chat <&- 2>&- --json -", (0, "")),
    ],
)
def test_standard_streams_that_are_full_or_closed(
    skip_bundle: Path, redirected: str, expected: tuple[int, str]
) -> None:
    what = "" if "--chat" in redirected else "--ids 1 --max-new-tokens 2"
    line = f"{shlex.join(command('run', skip_bundle))} {what} {redirected}"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment())
    assert (ran.returncode, ran.stderr[: len(expected[1]) or None]) == expected
    assert ran.stdout == "" or json.loads(ran.stdout)["messages"] == []


def test_characters_that_the_output_cannot_show(skip_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bündel"
    bundle.symlink_to(skip_bundle)
    ran = subprocess.run(
        command("inspect", bundle), capture_output=True, text=True, env=environment(PYTHONIOENCODING="ascii")
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "b?ndel" in ran.stdout


def test_running_a_bundle_loads_neither_torch_nor_the_graph_builder(skip_bundle: Path) -> None:
    script = (
        "import sys\n"
        "from dynexport.exporter.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'onnxscript', 'gguf'} & set(sys.modules)\n"
        "    print(sorted(heavy), end.code, file=sys.stderr)\n"
    )
    arguments = ["run", str(skip_bundle), "--prompt", "Hello", "--max-new-tokens", "3", "--json", "-"]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment())
    assert len(json.loads(ran.stdout)["ids"]) == 3
    assert ran.stderr.splitlines()[-1] == "[] 0"


def test_a_user_without_a_home(skip_bundle: Path) -> None:
    """As in a container, where a user may have a number only."""
    script = (
        "import os, pwd\n"
        "del os.environ['HOME']\n"
        "pwd.getpwuid = {}.__getitem__\n"
        "from dynexport.exporter.cli.main import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", script, "run", str(skip_bundle), "--prompt", "Hello", "--max-new-tokens", "3"]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment(HOME="/"))
    assert (ran.returncode, ran.stderr) == (0, "")
