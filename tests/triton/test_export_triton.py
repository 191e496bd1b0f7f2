"""``dynexport export-triton`` writes a complete model or nothing, and replaces nothing that is not its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bundles import contents, dynexport, error_of, skip_bundle  # noqa: F401

from dynexport.exporter.triton import repository
from dynexport.exporter.triton.config import config_text
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.serving.triton.fields import INPUTS, OUTPUTS, SETTINGS
from dynexport.runtime.serving.triton.loading import read_settings


def export(bundle: Path, *options: object) -> str:
    ran = dynexport("export-triton", bundle, *options)
    assert ran.code == 0, ran.err
    return ran.out


def test_a_model_has_its_files(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    models = tmp_path / "models"
    ran = dynexport("export-triton", skip_bundle, "-o", models, "--name", "small", "--max-rows", 3, "--json", "-")
    assert ran.report["directory"] == str(models / "small") and ran.report["settings"]["max_rows"] == "3"
    assert [path.name for path in models.iterdir()] == ["small"]
    assert {path.name for path in (models / "small").iterdir()} == {"config.pbtxt", "1"}
    assert {path.name for path in (models / "small" / "1").iterdir()} == {"model.py", "bundle"}
    assert contents(models / "small" / "1" / "bundle") == contents(skip_bundle)
    Bundle.open(models / "small" / "1" / "bundle").check()
    compile((models / "small" / "1" / "model.py").read_text(), "model.py", "exec")
    assert 'key: "max_rows", value: { string_value: "3" }' in (models / "small" / "config.pbtxt").read_text()


def test_a_link_takes_no_room(skip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(skip_bundle.parent)
    export(Path(skip_bundle.name), "-o", tmp_path / "models", "--link")
    link = tmp_path / "models" / "bundle" / "1" / "bundle"
    assert link.is_symlink() and link.readlink() == skip_bundle.resolve()
    assert Bundle.open(link).manifest.model.layers == 8


def test_every_field_is_written_with_a_comment() -> None:
    text = config_text("a", {"threads": "2"})
    for word, tensors in (("input", INPUTS), ("output", OUTPUTS)):
        for tensor in tensors:
            dims = -1 if tensor.several else 1
            line = f'{word} \\[ {{ name: "{tensor.name}", data_type: TYPE_{tensor.kind}, dims: \\[ {dims} \\]'
            assert re.search(rf"^# {re.escape(tensor.text)}\n{line}", text, re.MULTILINE), tensor.name
    for setting in SETTINGS:
        assert re.search(rf'^# {re.escape(setting.text)}\n(# )?parameters {{ key: "{setting.name}"', text, re.MULTILINE)
    assert '\nparameters { key: "threads", value: { string_value: "2" } }' in text
    assert '\n# parameters { key: "max_length", value: { string_value: "" } }' in text


def test_an_earlier_export_is_replaced_with_force_only(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    models = tmp_path / "models"
    export(skip_bundle, "-o", models, "--link")
    assert "found one; replace it with --force" in error_of(dynexport("export-triton", skip_bundle, "-o", models))
    assert (models / "bundle" / "1" / "bundle").is_symlink()
    export(skip_bundle, "-o", models, "--force")
    assert not (models / "bundle" / "1" / "bundle").is_symlink()
    assert [path.name for path in models.iterdir()] == ["bundle"]


@pytest.mark.parametrize("kind", ["others' model", "file", "link"])
def test_what_is_not_an_export_is_never_replaced(skip_bundle: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    place = tmp_path / "bundle"
    if kind == "others' model":
        place.mkdir()
        (place / "config.pbtxt").write_text('name: "bundle"\n')
    elif kind == "file":
        place.write_text("text")
    else:
        place.symlink_to(skip_bundle)
    ran = dynexport("export-triton", skip_bundle, "-o", tmp_path, "--force")
    assert "expected an earlier export or nothing, found other files" in error_of(ran)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_nothing_is_left_of_an_export_that_fails(
    skip_bundle: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository.shutil, "copyfile", full)
    ran = dynexport("export-triton", skip_bundle, "-o", tmp_path / "models")
    assert "expected a place to write a model, found: [Errno 28] No space left on device" in error_of(ran)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--name", "../up"], "--name: expected letters, digits and . + - _, found '../up'"),
        (["--name", ".hidden"], "--name: expected letters"),
        (["--threads", "0"], "threads: expected at least 1, found 0"),
        (["--max-rows", "-2"], "max_rows: expected at least 1, found -2"),
        (["--drain-seconds", "nan"], "drain_seconds: expected a number from 0 to 3600, found 'nan'"),
    ],
)
def test_bad_options(skip_bundle: Path, tmp_path: Path, options: list[str], message: str) -> None:  # noqa: F811
    assert message in error_of(dynexport("export-triton", skip_bundle, "-o", tmp_path / "models", *options))
    assert not (tmp_path / "models").exists()


def test_not_a_bundle(tmp_path: Path) -> None:
    assert "expected a bundle" in error_of(dynexport("export-triton", tmp_path, "-o", tmp_path / "models"))


def test_settings_are_read_as_they_were_written() -> None:
    read = read_settings({"threads": "3", "max_length": "64", "prefix_bytes": "0", "queue": ""})
    assert (read.threads, read.scheduler.tokens, read.scheduler.prefix_bytes, read.scheduler.queue) == (3, 64, 0, 256)
    for given, message in (
        ({"thread": "1"}, "parameters: expected some of backend, threads, .* found thread$"),
        ({"threads": "1.5"}, "threads: expected a whole number, found '1.5'"),
        ({"backend": "cpu"}, "backend: expected one of onnxruntime, .* found cpu"),
        ({"chunk": "0"}, "chunk: expected at least 1, found 0"),
    ):
        with pytest.raises(DynexportError, match=message):
            read_settings(given)
