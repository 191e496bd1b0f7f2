"""Writing a bundle: its name holds the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundles import CONFORMANCE, contents, environment

from dynexport.exporter import bundle_writer
from dynexport.exporter.bundle_writer import replacing
from dynexport.exporter.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Generator

# The command line, standing still in the middle of the weights.
SLOW_CONVERT = """
import sys, time
from dynexport.exporter.cli import main, output

def stand_still(bar, name, done, total):
    if done == 3:
        print("waiting", flush=True)
        time.sleep(60)

output.ProgressBar.working_on = stand_still
sys.argv = ["dynexport", "convert", sys.argv[1], "--no-golden", "-o", sys.argv[2]]
main.main()
"""
DEAD_PROCESS = 1 << 29  # more than Linux ever gives


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -9, "")],
    ids=["terminate", "interrupt", "kill"],
)
def test_a_convert_that_is_ended_in_the_middle(bundle: Path, number: int, code: int, said: str) -> None:
    before = contents(bundle)
    arguments = [sys.executable, "-c", SLOW_CONVERT, str(CONFORMANCE / "dense"), str(bundle)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        assert f".bundle.{process.pid}.part" in siblings(bundle)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error.strip()) == (code, said)
    assert contents(bundle) == before
    assert len(Generator(Bundle.open(bundle), threads=1).generate([[1]], max_new_tokens=2)[0].ids) == 2
    if number == signal.SIGKILL:
        assert siblings(bundle) == [f".bundle.{process.pid}.part"]
        convert(CONFORMANCE / "dense", bundle, golden=False)
        assert Bundle.open(bundle).manifest.contract.strategy == "dense"
    assert siblings(bundle) == []


def siblings(bundle: Path) -> list[str]:
    return [path.name for path in bundle.parent.iterdir() if path != bundle]


@pytest.mark.parametrize("failure", [DynexportError("x"), KeyboardInterrupt(), SystemExit(143), ValueError("x")])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_block_that_fails_leaves_what_was_there(bundle: Path, failure: BaseException, earlier: bool) -> None:
    output = bundle if earlier else bundle.parent / "new"
    before = contents(bundle.parent)
    with pytest.raises(type(failure)), replacing(output) as part:
        (part / "half").write_bytes(b"half")
        raise failure
    assert contents(bundle.parent) == before
    assert output.exists() == earlier


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_the_new_bundle_takes_the_place_of_the_old(
    bundle: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(bundle_writer, "_exchange", lambda *_: False)
    convert(CONFORMANCE / "dense", bundle, golden=False)
    assert contents(bundle).keys() == {"manifest.json", "model.onnx", "model.data"}
    assert Bundle.open(bundle).manifest.contract.strategy == "dense"
    assert siblings(bundle) == []


def test_an_empty_directory_or_none_becomes_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        convert(CONFORMANCE / "dense", output, golden=False)
        Bundle.open(output)


def test_a_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = convert(CONFORMANCE / "dense", "b", golden=False)
    assert Bundle.open("b").manifest == done.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_is_no_bundle_is_never_replaced(bundle: Path) -> None:
    home = bundle.parent
    (home / "file").write_text("precious")
    (home / "folder").mkdir()
    (home / "folder" / "file").write_text("precious")
    (home / "link").symlink_to(bundle)
    (home / "broken").symlink_to(home / "nowhere")
    before = contents(home)
    for name in ("file", "folder", "link", "broken"):
        with pytest.raises(DynexportError, match=rf"{name}: expected .* found .*; choose another -o"):
            convert(CONFORMANCE / "dense", home / name, golden=False)
    assert contents(home) == before
    assert (home / "link").is_symlink() and (home / "broken").is_symlink()


@pytest.mark.parametrize("place", ["file/bundle", "x" * 300, "x" * 250, "with\0null"])
def test_a_place_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DynexportError, match="expected a place to write a bundle, found"):
        convert(CONFORMANCE / "dense", tmp_path / place, golden=False)
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_file_system_that_takes_no_files() -> None:
    with pytest.raises(DynexportError, match="/proc/bundle: expected a place to write a bundle, found"):
        convert(CONFORMANCE / "dense", "/proc/bundle", golden=False)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 100_000], ids=["in the graph", "in the weights"])
def test_a_disk_that_fills_up(bundle: Path, size: int) -> None:
    before = contents(bundle.parent)
    message = r"bundle: cannot write the bundle .* an earlier one is untouched"
    with pytest.raises(DynexportError, match=message), files_of_at_most(size):
        convert(CONFORMANCE / "skip-3x", bundle, golden=False)
    assert contents(bundle.parent) == before


def test_leftovers_of_dead_runs_are_cleared_away_and_others_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "b[0]"
    # In a container every run may have the same number, so one's own is a leftover too.
    dead = [f".b[0].{DEAD_PROCESS}.part", f".b[0].{os.getpid()}.part"]
    alive = [f".b[0].{os.getppid()}.part", f".other.{DEAD_PROCESS}.part", f".b0.{DEAD_PROCESS}.part", ".b[0].x.part"]
    for name in dead + alive:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"half")
    convert(CONFORMANCE / "dense", output, golden=False)
    assert {path.name for path in tmp_path.iterdir()} == {*alive, "b[0]"}


def test_two_conversions_of_one_model_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(CONFORMANCE / "skip-2x", tmp_path / name, golden=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
