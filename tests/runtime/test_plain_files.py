"""What lies in a file's place and is none is refused in a line, and never waited for."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import hash_plain, open_named, open_plain, read_plain


def make(home: Path, kind: str) -> Path:
    """Something in the place of a file."""
    path = home / "place"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a link that leads nowhere":
        path.symlink_to("nowhere")
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path.relative_to(home)))
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    return path


KINDS = ["none", "a pipe", "a directory", "a link that leads nowhere", "a socket", "a device"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path, kind)
    for read in (open_plain, read_plain, hash_plain):
        with pytest.raises(DynexportError) as caught:
            read(path, "a text file")
        assert str(caught.value) == f"{path}: expected a text file, found {kind}"


@pytest.mark.parametrize("name", ["with\0null", "x" * 300, "file/below", "../" * 3000])
def test_a_path_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DynexportError, match="expected a file, found none that can be read "):
        read_plain(tmp_path / name)


def test_links_are_followed_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link") == b"content"
    with pytest.raises(DynexportError, match="link: expected a file, found a link"):
        read_plain(tmp_path / "link", follow=False)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DynexportError, match=f"expected a file of at most 536870912 bytes, found {1 << 40}"):
        read_plain(tmp_path / "file")


def test_a_pipe_that_the_user_names(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open_named(Path(f"/dev/fd/{reading}")) as file:
        later = threading.Timer(0.05, lambda: (os.write(writing, b"hello"), os.close(writing)))
        later.start()
        assert file.read() == b"hello"
        later.join()
    os.close(reading)
    with open_named(Path("/dev/null")) as file:
        assert file.read() == b""
    with open_named(make(tmp_path, "a pipe")) as file:  # nobody writes to it
        assert file.read() == b""
    with pytest.raises(DynexportError, match="expected a file, found a directory"):
        open_named(tmp_path)
