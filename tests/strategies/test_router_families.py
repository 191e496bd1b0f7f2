"""Families whose layers routers cannot choose among, or only from hidden states without a norm: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_radial_model, save_routed_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.errors import DynexportError

pytest.importorskip("transformers")


def test_a_router_takes_no_norm_that_a_layer_does_not_have(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    save_routed_model(tmp_path / "model", saved_model("olmo2"))
    with pytest.raises(DynexportError, match="router_input: expected hidden, as layers of olmo2 have no norm"):
        convert(tmp_path / "model", tmp_path / "bundle", fields={"router_input": "normed"}, golden=False)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("family", "expected"),
    [("olmo2", "expected layers with an input norm"), ("gemma3_text", "expected one set of rotary positions")],
)
def test_radial(family: str, expected: str, saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = save_radial_model(tmp_path / "model", saved_model(family))
    with pytest.raises(DynexportError, match=f"radial: {expected}.* found {family}"):
        convert(model, tmp_path / "bundle", golden=False)


def test_mod_wants_one_set_of_rotary_positions(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    save_routed_model(tmp_path / "model", saved_model("gemma3_text"))
    with pytest.raises(DynexportError, match="mod: expected one set of rotary positions, found gemma3_text"):
        convert(tmp_path / "model", tmp_path / "bundle", golden=False)
