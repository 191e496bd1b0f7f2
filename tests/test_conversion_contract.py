"""The contract that a conversion goes by: what config.json declares, and what its caller asks for on top of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE, checkpoint

from dynexport.exporter.bundle.contract import merged, read_contract
from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.contract import Dense, Mod


def contract(case: str, **arguments: Any) -> dict[str, Any]:
    return read_contract(open_checkpoint(CONFORMANCE / case), **arguments).model_dump(mode="json")


def test_what_is_declared() -> None:
    found = read_contract(open_checkpoint(CONFORMANCE / "mod-overflow"))
    assert isinstance(found, Mod) and (found.capacity, found.cache.capacity) == (0.25, 0.04)
    assert read_contract(open_checkpoint(CONFORMANCE / "dense")) == Dense()


def test_changes_go_on_top_field_by_field() -> None:
    found = contract("mod-overflow", changes={"cache": {"overflow": "error"}, "capacity": 0.5})
    assert found == contract("mod-overflow") | {"cache": {"capacity": 0.04, "overflow": "error"}, "capacity": 0.5}


def test_changes_go_last() -> None:
    found = contract("skip-2x", speedups=[3.0], rule="modulo", changes={"rule": "balanced"})
    assert (found["speedups"], found["rule"]) == ([3.0], "balanced")


def test_another_strategy_takes_nothing_of_what_is_declared() -> None:
    found = contract("skip-2x", strategy="mod", changes={"routed_layers": [1]})
    assert found == Mod(routed_layers=(1,)).model_dump(mode="json")


def test_layers_may_be_numbers_or_text(tmp_path: Path) -> None:
    declared = {"strategy": "mod", "routed_layers": [1, 3], "thresholds": {"1": 0.25, "3": 0.75}}
    model = checkpoint(tmp_path / "model", "mod-router", dynexport=declared)
    convert(model, tmp_path / "bundle", fields={"thresholds": {3: 0.5}}, golden=False)
    found = Bundle.open(tmp_path / "bundle").manifest.contract
    assert isinstance(found, Mod) and found.thresholds == {1: 0.25, 3: 0.5}


def test_a_strategy_is_not_a_field_to_set() -> None:
    assert contract("mod-router", changes={"strategy": "mod"}) == contract("mod-router")
    for changes in ({"strategy": "dense"}, {"strategy": None}):
        with pytest.raises(DynexportError, match="strategy: expected mod among the fields to set, found"):
            contract("mod-router", changes=changes)


@pytest.mark.parametrize("changes", [None, {}])
def test_mod_needs_its_layers(changes: dict[str, Any] | None) -> None:
    with pytest.raises(DynexportError, match=r"dense: contract: routed_layers: expected the layers with a router"):
        contract("dense", strategy="mod", changes=changes)


def test_merging_leaves_its_arguments_alone() -> None:
    fields: dict[str, Any] = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    changes: dict[str, Any] = {"a": {"c": {"f": 3}}, "e": {"g": 4}, 5: 6}
    assert merged(fields, changes) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": {"g": 4}, "5": 6}
    assert fields == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert changes == {"a": {"c": {"f": 3}}, "e": {"g": 4}, 5: 6}


def test_the_importer_is_kept_only_where_there_was_one(tmp_path: Path) -> None:
    done = convert(CONFORMANCE / "mod-router", tmp_path / "bundle", golden=False)
    assert done.notes == () and done.manifest.source.importer is None
