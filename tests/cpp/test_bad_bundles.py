"""C++ opens the bundles that Python opens, and refuses the others in the same words and with the same exit code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from bad_bundles import BAD_BUNDLES, Bad
from bundles import CONFORMANCE, change_manifest, copied, ids_bundle, skip_bundle  # noqa: F401 - fixtures
from conftest import BUILD, Run

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.manifest import Manifest

# Fields that a runtime needs no more once they are checked.
NOT_KEPT = {"schema_version", "contract", "cache_text", "cost", "source", "tools"}
# Where JSON has no syntax, each parser has its own words; numbers beyond 64 bits are shown as floating point.
OWN_WORDS = ("expected JSON, found something else (", "Input should be less than ", "expected an ONNX model, found ")


def kept(manifest: Manifest) -> dict[str, Any]:
    """What a C++ manifest has, as JSON."""
    fields: dict[str, Any] = manifest.model_dump(mode="json", exclude=NOT_KEPT)
    fields["caches"].sort(key=lambda cache: cache["place"])
    return fields


def cases() -> list[str]:
    return sorted(path.name for path in CONFORMANCE.iterdir() if (path / "config.json").exists())


@pytest.mark.parametrize("case", cases())
def test_a_manifest_has_what_python_reads(case: str, tmp_path: Path, run: Run) -> None:
    convert(CONFORMANCE / case, tmp_path / "bundle", golden=False)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    ran = run("probe_bundle", tmp_path / "bundle")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.pop("found") == []
    assert found == kept(manifest)


def test_depths(ids_bundle: Path, run: Run) -> None:  # noqa: F811
    opened = Bundle.open(ids_bundle)
    wanted = ("-", "2", "2.0", "1.5", "15e-1", "1", "1.0", "full")
    ran = run("probe_bundle", ids_bundle, *wanted)
    expected = [opened.depth(None if name == "-" else name).model_dump(mode="json") for name in wanted]
    assert json.loads(ran.stdout)["found"] == expected
    for name in ("0", "-1", "3", "nan", "inf", "", "two", "2x", "0x2", "\n"):
        with pytest.raises(DynexportError) as caught:
            opened.depth(name)
        ran = run("probe_bundle", ids_bundle, name)
        assert (ran.returncode, ran.stderr.decode()) == (2, f"error: {caught.value}\n")


def checked_after(change: Callable[[], object], bundle: Path) -> tuple[int, str]:
    """Exit code and error of a program that opens a bundle, and checks it after a change."""
    command = [str(BUILD / "probe_bundle"), "check", str(bundle)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as opened:
        assert opened.stdout and opened.stdout.readline() == "opened\n"
        change()
        _, error = opened.communicate("\n", timeout=60)
    return opened.returncode, error


def test_a_bundle_that_changes(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    bundle, other = (copied(skip_bundle, tmp_path / name) for name in ("bundle", "other"))
    assert checked_after(lambda: None, bundle) == (0, "")
    words = (
        "expected the file that was there when the bundle was opened, found it replaced or written to; open the bundle"
    )
    for name in ("model.data", "manifest.json"):
        code, error = checked_after(lambda name=name: (other / name).replace(bundle / name), bundle)  # type: ignore[misc]
        assert code == 2 and f"{name}: {words} again" in error


def test_large_files_are_hashed_when_asked_for(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    bundle = copied(skip_bundle, tmp_path / "bundle")
    size = (64 << 20) + 1
    with (bundle / "large").open("wb") as file:
        file.truncate(size)
    entry = {"sha256": "0" * 64, "bytes": size}
    change_manifest(bundle, lambda fields: fields["files"].update(large=entry))
    with pytest.raises(DynexportError) as expected:
        Bundle.open(bundle).check()
    assert checked_after(lambda: None, bundle) == (2, f"error: {expected.value}\n")


@pytest.mark.parametrize("bad", BAD_BUNDLES.values(), ids=BAD_BUNDLES)
def test_a_bad_bundle(bad: Bad, skip_bundle: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    bundle = copied(skip_bundle, tmp_path / "bundle")
    bad.damage(bundle)
    ran = run("probe_bundle", bundle)
    if bad.opens:
        assert ran.returncode == 0, ran.stderr
        return
    with pytest.raises(DynexportError) as caught:
        Bundle.open(bundle)
    message = ran.stderr.decode().removesuffix("\n")
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert all(words in message for words in bad.words), message
    assert message.isprintable() and len(message) < 1000
    own = next((words for words in OWN_WORDS if words in message), None)
    assert (
        message.partition(own)[:2] == f"error: {caught.value}".partition(own)[:2]
        if own
        else (message == f"error: {caught.value}")
    )
