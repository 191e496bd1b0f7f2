"""Writing traces: the old file or the new one, never a part of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dynexport.exporter.trace import Trace, TraceFile
from dynexport.runtime.bundle.errors import DynexportError

MakeTrace = Callable[..., Trace]


def test_the_file_is_replaced_and_nothing_else_is_left(tmp_path: Path, make_trace: MakeTrace) -> None:
    path = tmp_path / "trace.JSON"
    path.write_text("an earlier one, and longer than that")
    file = TraceFile(path)
    assert path.read_text() == "an earlier one, and longer than that"
    file.write(make_trace(2, [1], 1, 1))
    assert json.loads(path.read_text())["layers"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.JSON"]


def test_asking_leaves_no_file(tmp_path: Path) -> None:
    TraceFile(tmp_path / "trace.html")
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(tmp_path: Path, make_trace: MakeTrace) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    TraceFile(tmp_path / "link.json").write(make_trace(2, [1], 1, 1))
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["layers"] == 2


def test_a_write_that_fails_leaves_the_earlier_file(
    tmp_path: Path, make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    path.write_text("an earlier one")
    file = TraceFile(path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DynexportError, match=r"trace\.json: expected a file to write, found No space left on device"):
        file.write(make_trace(2, [1], 1, 1))
    assert path.read_text() == "an earlier one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]


def test_a_place_that_vanished_since(tmp_path: Path, make_trace: MakeTrace) -> None:
    (tmp_path / "there").mkdir()
    file = TraceFile(tmp_path / "there" / "trace.json")
    (tmp_path / "there").rmdir()
    with pytest.raises(DynexportError, match="expected a file to write, found No such file"):
        file.write(make_trace(2, [1], 1, 1))
