"""Faults are planted in bundles that pass: each is caught by what the table in docs/verification.md says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE
from faults import FAULTS, Fault
from planting import Planted
from tiny_models import FAMILIES, save_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.parity import verify
from dynexport.exporter.parity.report import Check
from dynexport.exporter.parity.thresholds import limits_of
from dynexport.exporter.parity.verification import Verification
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError

pytest.importorskip("transformers")
_STATIC = ("kept_sets", "constants")
_SIZES = {"max_position_embeddings": 160}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", _SIZES | {"sliding_window": 100}),
    "long": ("llama", _SIZES),
    "int4": ("llama", _SIZES),
    "pieces": ("llama", {"max_position_embeddings": 1100}),
    "gemma2": ("gemma2", {}),
    "bloom": ("bloom", {}),
    "opt": ("opt", {}),
}
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "skip": ("skip-2x", {}),
    "mod": ("mod-router", {"fields": {"cache": {"capacity": 0.3}}}),
    "mod-roomy": ("mod-router", {"fields": {"cache": {"capacity": 0.9}}}),
    "mod-topk": ("mod-topk", {}),
    "radial": ("radial-step", {}),
    "radial-layer": ("radial-layer", {}),
    "radial-single": ("radial-noreuse-min", {"layer_capacity": 1.0}),
    "tensorrt": ("mod-router", {"target": "tensorrt"}),
}
BundleOf = Callable[[str], tuple[Bundle, Path]]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """A bundle with golden vectors, and its model."""

    @cache
    def make(name: str) -> tuple[Bundle, Path]:
        home = tmp_path_factory.mktemp(name)
        model, options = home / "model", {}
        if name in _MODELS:
            family, fields = _MODELS[name]
            save_model(model, family, FAMILIES[family] | fields)
            options = {"precision": "int4"} if name == "int4" else {}
        else:
            case, options = _CASES[name]
            model = CONFORMANCE / case
        convert(model, home / "bundle", **options)
        return Bundle.open(home / "bundle"), model

    return make


def caught(bundle: Bundle, against: Path | None) -> tuple[bool, str | None]:
    """Whether what only reads catches a fault; and the first of all that runs that does."""
    limits = limits_of(bundle.manifest.target, bundle.manifest.precision)
    read = False
    try:
        for measurement in Verification.prepare(bundle, against, threads=1, new_tokens=4).checks():
            failed = not Check.judged(measurement, limits).passed
            if failed and measurement.name not in _STATIC:
                return read, measurement.name
            read = read or failed
    except DynexportError:
        return read, "refused"
    return read, None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_fault_is_caught(fault: Fault, bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, model = bundle_of(fault.bundle)
    copy = Planted(bundle, tmp_path / "copy")
    fault.plant(copy, monkeypatch)
    assert caught(copy.bundle(), model if fault.against else None) == (fault.read, fault.run)
    assert fault.read or fault.run


@pytest.mark.parametrize("name", sorted({fault.bundle for fault in FAULTS}))
def test_without_a_fault_nothing_is_caught(name: str, bundle_of: BundleOf) -> None:
    report = verify(bundle_of(name)[0], threads=1)
    assert report.passed, [(check.name, check.failures) for check in report.checks if not check.passed]
