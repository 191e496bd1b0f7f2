"""Bundles that call the CPU operators, also in branches: with the library, and without it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from bundles import CONFORMANCE, change_tensors, checkpoint, dynexport

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.parity import entries
from dynexport.plugins.attention import NAME
from dynexport.plugins.cpu_library import OPERATORS, VARIABLE
from dynexport.plugins.fused import FUSED
from dynexport.plugins.products import PRODUCTS
from dynexport.plugins.routes import ROUTES
from dynexport.plugins.selections import SELECTIONS
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines import cpu_operators
from dynexport.runtime.execution.executor import Executor

DOWN = "model.layers.0.mlp.down_proj.weight"
# Ascending, as a manifest has them.
ATTENTION = ("CachedAttention",)
HALVES = ("CachedAttention", "HalfAfterAttention", "HalfGather", "HalfNormMatMul")
# The down projection of this model has no whole blocks, so its layers are not joined.
BLOCKS = ("BlockGather", "BlockMatMul", "BlockNormMatMul", "CachedAttention")


@pytest.mark.parametrize(
    ("precision", "operators"),
    [("fp32", ATTENTION), ("fp16", HALVES), ("bf16", HALVES), ("int8", BLOCKS), ("int4", BLOCKS)],
)
@pytest.mark.parametrize("library", [True, False])
def test_a_bundle_is_verified(
    precision: str, operators: tuple[str, ...], library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setenv(VARIABLE, "")
    source, bundle = checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"
    manifest = convert(source, bundle, precision=precision, plugins=True, golden=False).manifest
    assert manifest.operators == operators
    ran = dynexport("verify", bundle, "--against", source, "--new-tokens", "4")
    assert ran.code == 0, ran.out + ran.err
    if precision == "bf16":  # whose arithmetic alone is not held to float32's limits
        change_tensors(source, lambda tensors: tensors.update({DOWN: -tensors[DOWN]}))
        assert dynexport("verify", bundle, "--against", source, "--new-tokens", "4").code == 1


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_float16_caches_are_verified_on_their_own_entries(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bundle = checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"
    manifest = convert(source, bundle, precision=precision, plugins=True, kv_cache_dtype="fp16").manifest
    assert {cache.parts["key"].dtype for cache in manifest.caches} == {"float16"}
    assert dynexport("verify", bundle, "--new-tokens", "4").code == 0
    ran = dynexport("verify", bundle, "--against", source, "--new-tokens", "4", "--json", "-")
    assert ran.code == 0, ran.out + ran.err
    assert {"arithmetic/steps/full", "entries/steps/full"} <= {check["name"] for check in ran.report["checks"]}
    # Entries that are a step off are no rounding.
    row = entries._row
    monkeypatch.setattr(
        entries, "_row", lambda *at: {k: (np.nextafter(a, np.float16(9)), b) for k, (a, b) in row(*at).items()}
    )
    ran = dynexport("verify", bundle, "--against", source, "--new-tokens", "4")
    assert ran.code == 1 and "expected entries within half a float16 step" in ran.out + ran.err


@pytest.mark.parametrize("library", [True, False])
def test_int8_caches_are_verified_on_their_own_entries(
    library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token attends to stored entries, so a prompt's logits are the same in one call and in three."""
    if not library:
        monkeypatch.setenv(VARIABLE, "")
    source, text = checkpoint(tmp_path / "checkpoint"), np.random.default_rng(3).integers(0, 60, 300).tolist()
    how = {"plugins": True, "kv_cache_dtype": "int8", "kv_cache_text": text}
    made = convert(source, tmp_path / "bundle", **how).manifest
    assert {part.dtype for cache in made.caches for part in cache.parts.values()} == {"int8"}
    assert made.operators == ATTENTION and made.limits.together == "always"
    assert dynexport("verify", tmp_path / "bundle", "--new-tokens", "4").code == 0
    ran = dynexport("verify", tmp_path / "bundle", "--against", source, "--new-tokens", "4", "--json", "-")
    assert ran.code == 0, ran.out + ran.err
    assert {"arithmetic/steps/full", "entries/turns/full"} <= {check["name"] for check in ran.report["checks"]}
    executor = Executor(Bundle.open(tmp_path / "bundle"), threads=1)
    whole, parts = executor.full_cache(1, 32), executor.full_cache(1, 32)
    expected = executor.prefill(whole, [text[:24]], all_logits=True)[0]
    found = [executor.prefill(parts, [text[at : at + 8]], all_logits=True)[0] for at in (0, 8, 16)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)


def test_int8_caches_of_layers_that_are_left_out(tmp_path: Path) -> None:
    text = np.random.default_rng(3).integers(0, 60, 300).tolist()
    how = {"plugins": True, "kv_cache_dtype": "int8", "kv_cache_text": text, "max_length": 64}
    for case in ("mod-router", "skip-2x"):
        convert(CONFORMANCE / case, tmp_path / case, golden=False, **how)
        ran = dynexport("verify", tmp_path / case, "--against", CONFORMANCE / case, "--new-tokens", "4")
        assert ran.code == 0, ran.out + ran.err


def test_without_the_library_one_warning_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    cpu_operators._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "dynexport"):
        assert [cpu_operators.library_for(names) for names in ((), ("SelectedMatMul",), BLOCKS, HALVES)] == [None] * 4
    assert [record.getMessage() for record in caplog.records] == [
        f"the library of CPU operators: turned off by {VARIABLE}; the graphs run without it, slower and with float32 "
        "weights in memory (docs/plugins.md)"
    ]


def test_a_library_that_the_environment_names_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere/library.so")
    with pytest.raises(DynexportError, match=r"expected a file at /nowhere/library\.so"):
        cpu_operators.library_for(BLOCKS)


def test_the_runtime_knows_the_operators() -> None:
    made = (*PRODUCTS, *ROUTES, *FUSED, *SELECTIONS)
    assert tuple(sorted([NAME, *(operator.name for operator in made)])) == OPERATORS
