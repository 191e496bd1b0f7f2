"""The fields of Mixture-of-Depths in the contract: what version 1 says, and what excludes each other."""

from __future__ import annotations

from typing import Any

import pytest

from dynexport.runtime.bundle.contract import Mod, parse_contract
from dynexport.runtime.bundle.errors import DynexportError


def mod(**fields: Any) -> Mod:
    contract = parse_contract({"strategy": "mod", "routed_layers": [1, 3], **fields}, "contract")
    assert isinstance(contract, Mod)
    return contract


def test_version_1_means_the_same_in_version_2() -> None:
    fields = {"gate": "sigmoid", "combine": "replace", "prefill": "topk", "positions": "compact"}
    old, new = mod(version=1, **fields), mod(**fields)
    assert old.model_dump() | {"version": 2} == new.model_dump()
    assert (new.target, new.skipped_kv, new.router.kind, new.skip_branch) == ("block", "none", "linear", "none")
    assert (new.keep_first, new.level, new.boundary, new.decisions_per_layer) == (0, "token", "k", 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"skipped_kv": "own", "skip_branch": "adapter", "gate": "split", "router": {"kind": "bottleneck"}},
        {"target": "attention+mlp", "skipped_kv": "own", "gate": "none", "router": {"kind": "pair"}},
        {"keep_first": 2, "gate": "none", "router": {"kind": "mlp", "epsilon": 1e-5}},
        {"level": "sequence", "target": "attention", "router_input": "normed", "gate": "none"},
        {"gate": "affine", "affine": [0.975, 0.05]},
        {"prefill": "topk", "boundary": "k-1"},
        {"target": "mlp", "skip_branch": "adapter", "gate": "split"},
    ],
    ids=["flexidepth", "skipgpt", "d-llm", "mindskip", "dlo", "astramind", "diffskip"],
)
def test_the_models_that_exist_can_be_said(fields: dict[str, Any]) -> None:
    contract = mod(**fields)
    assert parse_contract(contract.model_dump(mode="json"), "again") == contract


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 3}, "version: "),
        ({"version": 1, "skipped_kv": "own"}, "version: expected 2, which has the field skipped_kv, found 1"),
        ({"version": 1, "gate": "split"}, "version: expected 2, which has the gate split, found 1"),
        ({"target": "layer"}, "target: "),
        ({"router": {"kind": "pair", "width": 3}}, "router.width: "),
        ({"router": {"activation": "relu"}}, "router.activation: expected silu where router.kind is not mlp"),
        ({"router": {"epsilon": 1e-6}}, "router.epsilon: expected none where router.kind is linear"),
        ({"target": "mlp", "skipped_kv": "own"}, "skipped_kv: expected none with target mlp"),
        ({"skipped_kv": "own", "positions": "compact"}, "positions: expected original"),
        ({"target": "mlp", "cache": {"capacity": 0.5}}, "cache.capacity: expected 1 where every token"),
        ({"target": "mlp", "combine": "replace"}, "combine: expected delta with target mlp"),
        ({"target": "attention", "gate": "split"}, "gate: expected raw, sigmoid or none with target attention"),
        ({"gate": "affine"}, "affine: expected two numbers with gate affine and only there, found none"),
        ({"affine": [1.0, 0.0]}, "affine: expected two numbers with gate affine and only there, found [1.0, 0.0]"),
        ({"skip_branch": "adapter"}, "gate: expected none or split with skip_branch adapter, found raw"),
        ({"skip_branch": "adapter", "target": "attention", "gate": "none"}, "skip_branch: expected none"),
        ({"prefill": "topk", "keep_first": 1}, "prefill: expected causal with keep_first 1, found topk"),
        ({"boundary": "k-1"}, "boundary: expected k where prompts are routed causally"),
        ({"level": "sequence", "target": "mlp"}, "level: expected token with target mlp"),
        (
            {"level": "sequence", "gate": "none", "cache": {"capacity": 0.5}},
            "cache.capacity: expected 1 with level sequence",
        ),
        ({"decision": {"rule": "predictor"}, "router": {"kind": "pair"}}, "decision.rule: expected router or always"),
        ({"keep_first": -1}, "keep_first: "),
        ({"keep_first": True}, "keep_first: "),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DynexportError, match=r"^contract: ") as caught:
        mod(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)
