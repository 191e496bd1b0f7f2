"""Opening a bundle: damage of any kind is one line that names the place, and nothing outside of it is ever read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_bundles import BAD_BUNDLES, Bad
from bundles import CONFORMANCE, change_manifest, copied, dynexport, error_of, replace_file

from dynexport.exporter.bundle import writer as bundle_writer
from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Model
from dynexport.runtime.bundle import bundle as bundle_module
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.text.text import Text


def refusal(bundle: Path) -> str:
    """What opening and running it says, which must be one line without the traceback of another error."""
    with pytest.raises(DynexportError) as caught:
        Model(Bundle.open(bundle), threads=1).generate([[1, 2, 3]], max_new_tokens=2)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


def test_a_bundle_opens(bundle: Path) -> None:
    opened = Bundle.open(str(bundle))
    assert opened.manifest.files.keys() == {path.name for path in bundle.iterdir()} - {"manifest.json"}
    assert opened.file("model.onnx") == bundle / "model.onnx" and opened.file("manifest.json") is None
    assert Text.of_bundle(opened).has_chat_template


@pytest.mark.parametrize("bad", BAD_BUNDLES.values(), ids=BAD_BUNDLES)
def test_a_bad_bundle(bundle: Path, bad: Bad) -> None:
    bad.damage(bundle)
    if bad.opens:
        Bundle.open(bundle)
    else:
        with pytest.raises(DynexportError):
            Bundle.open(bundle)
    message = refusal(bundle)
    assert all(words in message for words in bad.words), message


def test_large_files_are_hashed_when_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynexport.runtime.bundle.bundle._HASHED_WHEN_OPENED", 10_000)
    content = bytearray((bundle / "model.data").read_bytes())
    content[-1] ^= 1
    (bundle / "model.data").write_bytes(content)
    opened = Bundle.open(bundle)
    with pytest.raises(DynexportError, match=r"model.data: expected sha256 .* convert again"):
        opened.check()
    assert dynexport("inspect", bundle).code == 0
    assert "model.data: expected sha256" in error_of(dynexport("inspect", bundle, "--check"))
    assert "model.data: expected sha256" in error_of(dynexport("verify", bundle))


@pytest.fixture
def other(bundle: Path) -> Path:
    """A bundle of the same graphs and sizes with other weights, as of a model that was trained on."""
    other = copied(bundle, bundle.parent / "other")
    replace_file(other, "model.data", bytes((other / "model.data").stat().st_size))
    return other


def exchanged(bundle: Path, other: Path) -> None:
    assert bundle_writer.exchange(other, bundle)


def removed(bundle: Path, other: Path) -> None:
    shutil.rmtree(bundle)


def written_to(bundle: Path, other: Path) -> None:
    shutil.copyfile(other / "model.data", bundle / "model.data")


def moved_in(bundle: Path, other: Path) -> None:
    for name in ("model.data", "manifest.json"):
        (other / name).replace(bundle / name)


def of_the_same_age(bundle: Path, other: Path) -> None:
    """As where both were unpacked from archives."""
    os.utime(other / "model.data", ns=(0, (bundle / "model.data").stat().st_mtime_ns))
    (other / "model.data").replace(bundle / "model.data")


@pytest.mark.parametrize("change", [exchanged, removed, written_to, moved_in, of_the_same_age])
def test_what_is_loaded_is_what_was_opened(
    bundle: Path, other: Path, change: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynexport.runtime.bundle.bundle._HASHED_WHEN_OPENED", 10_000)
    opened = Bundle.open(bundle)
    loaded, lazy, text = Model(opened, threads=1), Model(opened, threads=1), Text.of_bundle(opened)
    before = loaded.generate([[1, 2, 3]], max_new_tokens=3)[0].ids
    change(bundle, other)
    for late in (lambda: lazy.generate([[1, 2, 3]], max_new_tokens=3), opened.check):
        with pytest.raises(DynexportError, match="expected the file that was there when the bundle was opened"):
            late()
    if change is written_to:
        return  # an engine maps weights: what is written into their file reaches it (docs/bundle.md)
    assert text.has_chat_template and loaded.generate([[1, 2, 3]], max_new_tokens=3)[0].ids == before


def test_a_bundle_that_is_replaced_while_it_is_opened(
    bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynexport.runtime.bundle.bundle._HASHED_WHEN_OPENED", 10_000)
    read = bundle_module._read_manifest

    def interrupted(directory: Path) -> Manifest:
        manifest = read(directory)
        exchanged(bundle, other)
        return manifest

    monkeypatch.setattr(bundle_module, "_read_manifest", interrupted)
    with pytest.raises(DynexportError, match=r"manifest.json: expected the file that was there when the bundle was op"):
        Bundle.open(bundle)


def test_a_file_that_the_manifest_does_not_list_is_not_used(bundle: Path) -> None:
    change_manifest(bundle, lambda fields: fields["files"].pop("tokenizer.json"))
    assert not Text.of_bundle(Bundle.open(bundle)).has_tokenizer


def test_weights_that_are_no_numbers_are_told_with_the_first_token(bundle: Path) -> None:
    size = (bundle / "model.data").stat().st_size // 4
    replace_file(bundle, "model.data", np.full(size, np.nan, np.float32).tobytes())
    assert "logits: row 0: expected a finite largest logit and no NaN" in refusal(bundle)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_text_files_that_are_none(bundle: Path, name: str) -> None:
    replace_file(bundle, name, b"\xff\xfe")
    assert f"{name}: " in refusal(bundle)


def test_the_ratios_of_a_bundle(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (declared,) = opened.manifest.depths
    assert [opened.depth(wanted) for wanted in (None, 2, "2", 2.0, "2.0")] == [declared] * 5
    assert [opened.depth(wanted).name for wanted in (1, "1", 1.0, "full")] == ["full"] * 4
    for wanted in (0, -1, 3, "nan", float("inf"), "", "two"):
        with pytest.raises(DynexportError, match=f"depth: expected 1, 2; found {wanted}"):
            opened.depth(wanted)


def test_a_bundle_says_whether_its_model_was_trained_for_its_strategy(bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.trained and [depth.trained for depth in manifest.depths] == [True] and manifest.full.trained
    for name, options in (("other", {"speedups": [1.5, 2]}), ("plain", {"strategy": "dense"})):
        convert(CONFORMANCE / "skip-2x", tmp_path / name, golden=False, **options)
    other, plain = (Bundle.open(tmp_path / name).manifest for name in ("other", "plain"))
    assert other.trained and {depth.name: depth.trained for depth in other.depths} == {"1.5": False, "2": True}
    assert not plain.trained
