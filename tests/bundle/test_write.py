"""Writing a bundle: its name holds the old one or the new one, whatever happens in between."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest
from bundles import CONFORMANCE, contents, environment

from dynexport.exporter.bundle import writer as bundle_writer
from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.bundle.writer import replacing
from dynexport.runtime import Bundle, DynexportError, Model
from dynexport.runtime.bundle.atomic import PART_PATTERN, part_directory
from dynexport.runtime.bundle.manifest import MANIFEST

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
        assert len(list(bundle.parent.glob(PART_PATTERN))) == 1
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error.strip()) == (code, said)
    assert contents(bundle) == before
    assert len(Model(Bundle.open(bundle), threads=1).generate([[1]], max_new_tokens=2)[0].ids) == 2
    if number == signal.SIGKILL:
        assert len(siblings(bundle)) == 1
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


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "file by file"])
def test_the_new_bundle_takes_the_place_of_the_old(
    bundle: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(bundle_writer, "exchange", lambda *_: False)
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
    (home / "broken").symlink_to(home / "nowhere")
    before = contents(home)
    for name in ("file", "folder", "broken"):
        with pytest.raises(DynexportError, match=rf"{name}: expected .* found .*; choose another -o"):
            convert(CONFORMANCE / "dense", home / name, golden=False)
    assert contents(home) == before
    assert (home / "broken").is_symlink()


@pytest.mark.parametrize("place", ["file/bundle", "x" * 300, "with\0null"])
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
    (tmp_path / ".dynexport-dead.part").mkdir()
    (tmp_path / ".dynexport-dead.part" / "half").write_bytes(b"half")
    (tmp_path / ".part").mkdir()
    with part_directory(tmp_path) as living:
        convert(CONFORMANCE / "dense", tmp_path / "b[0]", golden=False)
        assert {path.name for path in tmp_path.iterdir()} == {living.name, ".part", "b[0]"}


class Killed(BaseException):
    """What nobody catches."""


def fill(directory: Path, **files: str) -> None:
    """Write the files of a bundle, as far as replacing one looks at them."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)
    (directory / MANIFEST).write_text(json.dumps({"files": dict.fromkeys(files)}))


def held(directory: Path) -> dict[str, str]:
    """What is in a directory, without manifests that say so."""
    assert json.loads((directory / MANIFEST).read_text())
    return {path.name: path.read_text() for path in directory.iterdir() if path.name != MANIFEST}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A bundle of two files and an engine, in a directory of its own."""
    bundle = tmp_path / "home" / "bundle"
    bundle.parent.mkdir()
    fill(bundle, graph="old", gone="old")
    (bundle / "engines").mkdir()
    return bundle


def test_the_name_holds_a_bundle_all_the_time(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, exchange = os.fsync, bundle_writer.exchange

    def recorded_fsync(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def recorded_exchange(part: Path, place: Path) -> bool:
        calls.append("exchange")
        assert (place / "graph").read_text() == "old"
        return exchange(part, place)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(bundle_writer, "exchange", recorded_exchange)
    for free_in_between in ("rename", "replace", "unlink"):
        monkeypatch.setattr(Path, free_in_between, lambda *_: pytest.fail("expected one exchange, found another way"))
    with replacing(earlier) as part:
        fill(part, graph="new")
        name = part.name
    assert held(earlier) == {"graph": "new"} and siblings(earlier) == []
    # Everything is on the disk before it has the name.
    assert set(calls[:3]) == {"graph", MANIFEST, name} and calls[3:] == ["exchange", earlier.parent.name]


def test_a_directory_that_somebody_stands_in_stays_the_same_one(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = earlier.stat().st_ino
    monkeypatch.chdir(earlier)
    with replacing(Path()) as part:
        fill(part, graph="new", more="new")
    assert held(Path()) == {"graph": "new", "more": "new"}
    assert Path().stat().st_ino == inode and siblings(earlier) == []


def test_a_shell_elsewhere_may_stand_there_too(earlier: Path) -> None:
    inode = earlier.stat().st_ino
    with subprocess.Popen(["sleep", "60"], cwd=earlier / "engines") as shell:
        with replacing(earlier) as part:
            fill(part, graph="new")
        shell.kill()
    assert held(earlier) == {"graph": "new"} and earlier.stat().st_ino == inode


def test_files_that_are_not_the_bundles_stay(earlier: Path) -> None:
    (earlier / "notes").write_text("precious")
    (earlier / ".git").mkdir()
    (earlier / ".git" / "HEAD").write_text("precious")
    (earlier / MANIFEST).write_text('{"files": {"graph": 0, "gone": 0, ".git": 0, "..": 0, "../other": 0}}')
    (earlier.parent / "other").write_text("precious")
    with replacing(earlier) as part:
        fill(part, graph="new")
    assert contents(earlier).keys() == {"graph", MANIFEST, "notes", ".git/HEAD"}
    assert (earlier.parent / "other").read_text() == "precious"


@pytest.mark.parametrize("why", ["a mount", "its parent"])
def test_a_directory_whose_name_cannot_be_given_away(earlier: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "a mount":
        assert bundle_writer._is_mount(Path("/proc")) and not bundle_writer._is_mount(earlier)
        monkeypatch.setattr(bundle_writer, "_is_mount", lambda place: place == earlier)
    else:
        monkeypatch.setattr(os, "access", lambda place, mode: place != earlier.parent)
    inode = earlier.stat().st_ino
    with replacing(earlier) as part:
        assert part.parent == earlier
        fill(part, graph="new")
    assert held(earlier) == {"graph": "new"} and earlier.stat().st_ino == inode


def test_conversions_to_one_place_at_once(tmp_path: Path) -> None:
    def convert_one(number: int) -> None:
        with replacing(tmp_path / "bundle") as part:
            fill(part, graph=str(number), weights=str(number))
            together.wait()

    together = Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(convert_one, range(4)))
    assert len(set(held(tmp_path / "bundle").values())) == 1 and siblings(tmp_path / "bundle") == []


def test_of_a_link_the_target_is_replaced(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(earlier)
    with replacing(tmp_path / "link") as part:
        fill(part, graph="new")
    assert (tmp_path / "link").is_symlink() and held(earlier) == {"graph": "new"}


def test_a_kill_at_any_moment_loses_nothing(earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the directory that stays: the old bundle is whole, or the next run finds all of the new one."""
    moments, outcomes = 0, []
    while len(outcomes) == moments:
        place = Path(shutil.copytree(earlier, tmp_path / f"{moments}"))
        (place / "notes").write_text("precious")
        with monkeypatch.context() as patched:
            left = iter(range(moments))

            def counted(act: Callable[..., object], left: Iterator[int] = left) -> Callable[..., object]:
                def acted(*arguments: object) -> object:
                    if next(left, None) is None:
                        raise Killed
                    return act(*arguments)

                return acted

            try:
                with replacing(place) as part:
                    fill(part, graph="new", more="new")
                    for owner, name in ((Path, "rename"), (Path, "replace"), (bundle_writer, "remove")):
                        patched.setattr(owner, name, counted(getattr(owner, name)))
                moments = -1
            except Killed:
                moments += 1
                if (place / MANIFEST).exists():  # then it is one bundle
                    names = json.loads((place / MANIFEST).read_text())["files"]
                    assert len({(place / name).read_text() for name in names}) == 1
        with pytest.raises(KeyError), replacing(place):  # the next run only begins
            raise KeyError
        shutil.rmtree(place / "engines", ignore_errors=True)
        outcomes.append(held(place))
    assert outcomes[0] == {"graph": "old", "gone": "old", "notes": "precious"}
    assert outcomes[1:] == [{"graph": "new", "more": "new", "notes": "precious"}] * (len(outcomes) - 1)
    assert len(outcomes) >= 8


def test_two_conversions_of_one_model_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(CONFORMANCE / "skip-2x", tmp_path / name, golden=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
