"""Files and directories that are written in one step, and what writers that ended have left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynexport.runtime.bundle import atomic
from dynexport.runtime.bundle.errors import DynexportError

# Another process, perhaps with our own number in a container of its own: it writes until it is killed.
WRITER = """
import sys, time
from pathlib import Path
from dynexport.runtime.bundle.atomic import part_directory, part_file

with part_directory(Path(sys.argv[1])) as directory, part_file(Path(sys.argv[1])) as file:
    (directory / "half").write_text("half")
    print(directory.name, file.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path, set[str]]]:
    """A process that writes a directory and a file, where, and their names."""
    home = tmp_path_factory.mktemp("shared")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(home)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, home, set(process.stdout.readline().split())
        process.kill()


def test_parts_of_a_living_process_are_left_alone_and_of_a_dead_one_removed(
    writer: tuple[subprocess.Popen[str], Path, set[str]],
) -> None:
    process, home, parts = writer
    assert len(parts) == 2 and {path.name for path in home.iterdir()} == parts
    atomic.write_file(home / "report.json", b"new")
    assert {path.name for path in home.iterdir()} == {*parts, "report.json"}
    process.kill()
    process.wait()
    atomic.write_file(home / "report.json", b"newer")
    assert [path.name for path in home.iterdir()] == ["report.json"]
    assert (home / "report.json").read_bytes() == b"newer"


def test_what_only_looks_like_a_part_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".dynexport-0.part")
    (tmp_path / ".dynexport-1.part").symlink_to(tmp_path)
    with atomic.part_file(tmp_path) as living, atomic.part_directory(tmp_path) as too:
        atomic.clear_leftovers(tmp_path)
        assert living.exists() and too.exists()
    assert {path.name for path in tmp_path.iterdir()} == {".dynexport-0.part", ".dynexport-1.part"}


def test_a_part_that_was_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = atomic.lock
    calls: list[int] = []

    def late(descriptor: int) -> bool | None:
        calls.append(descriptor)
        if len(calls) == 1:
            atomic.remove(next(tmp_path.glob(atomic.PART_PATTERN)))
        return lock(descriptor)

    monkeypatch.setattr(atomic, "lock", late)
    with atomic.part_directory(tmp_path) as part:
        assert part.is_dir() and len(calls) == 2


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().suffix or 'directory'}")
        fsync(descriptor)

    def recorded_replace(part: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(part, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    atomic.write_file(tmp_path / "report.json", b"x")
    assert calls == ["sync .part", "rename", "sync directory"]


def test_a_link_stays_a_link_and_a_mode_a_mode(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("old")
    (tmp_path / "report").chmod(0o640)
    (tmp_path / "link").symlink_to("report")
    atomic.write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "report").read_bytes() == b"new"
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o640


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic.check_writable(tmp_path / "pipe", "--json")
        atomic.write_file(tmp_path / "pipe", b"{}")
        assert os.read(reader, 10) == b"{}"
    finally:
        os.close(reader)


@pytest.mark.parametrize("place", [".", "none/report", "file/report", "with\0null", "x" * 300, "/proc/report"])
def test_a_place_that_cannot_be_written_is_told_before(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DynexportError, match=r"--json .*: expected a file to write, found "):
        atomic.check_writable(tmp_path / place, "--json")
    atomic.check_writable(tmp_path / "file", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "precious"


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_file(tmp_path / "report", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["report"] and (tmp_path / "report").read_text() == "old"
