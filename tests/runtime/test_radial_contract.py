"""The radial fields of the routing contract: defaults, ranges, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dynexport.runtime.bundle.contract import Radial, first_problem


def test_fields_that_are_left_out() -> None:
    assert Radial.model_validate({"strategy": "radial"}).model_dump() == {
        "strategy": "radial",
        "max_steps": 12,
        "min_steps": 0,
        "exit": True,
        "allow_reuse": True,
        "router": {"hidden": 64, "shared": True},
        "gate": "none",
        "cache_policy": "step",
    }


def test_all_fields_given() -> None:
    fields = {
        "strategy": "radial",
        "max_steps": 5,
        "min_steps": 5,
        "exit": False,
        "allow_reuse": False,
        "router": {"hidden": 1, "shared": False},
        "gate": "probability",
        "cache_policy": "layer",
    }
    contract = Radial.model_validate(fields)
    assert contract.model_dump() == fields
    assert Radial.model_validate_json(contract.model_dump_json()) == contract
    assert Radial.model_validate({"router": {"hidden": 12}}).router.shared


def test_exit_is_one_choice_more() -> None:
    assert Radial().choices(4) == 5
    assert Radial(exit=False).choices(4) == 4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_steps": 0}, "max_steps: Input should be greater than or equal to 1, found 0"),
        ({"max_steps": True}, "max_steps: Input should be a valid integer, found True"),
        ({"max_steps": 2.0}, "max_steps: Input should be a valid integer, found 2.0"),
        ({"min_steps": -1}, "min_steps: Input should be greater than or equal to 0, found -1"),
        ({"max_steps": 3, "min_steps": 4}, "min_steps: expected at most max_steps = 3, found 4"),
        ({"min_steps": 13}, "min_steps: expected at most max_steps = 12, found 13"),
        ({"exit": 1}, "exit: Input should be a valid boolean, found 1"),
        ({"allow_reuse": "no"}, "allow_reuse: Input should be a valid boolean, found 'no'"),
        ({"router": {"hidden": 0}}, "router.hidden: Input should be greater than or equal to 1, found 0"),
        ({"router": {"shared": None}}, "router.shared: Input should be a valid boolean, found None"),
        ({"router": {"width": 8}}, "router.width: Extra inputs are not permitted, found 8"),
        ({"gate": "raw"}, "gate: Input should be 'none' or 'probability', found 'raw'"),
        ({"cache_policy": "token"}, "cache_policy: Input should be 'step' or 'layer', found 'token'"),
        ({"steps": 3}, "steps: Extra inputs are not permitted, found 3"),
        ({"strategy": "mod"}, "strategy: Input should be 'radial', found 'mod'"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as error:
        Radial.model_validate(fields)
    assert first_problem(error.value) == expected
