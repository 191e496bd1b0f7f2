"""``dynexport convert`` for Mixture-of-Depths: --set, --import, and what is wrong with routers and contracts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import change_tensors, checkpoint, contents, dynexport, error_of

from dynexport.runtime import Bundle

ROUTER = "model.layers.3.mod_router.weight"
FIRST = "model.layers.3.mod_predictor.fc1.weight"


def convert(model: Path, *arguments: object) -> dict[str, Any]:
    """The contract of the bundle beside the model."""
    ran = dynexport("convert", model, "--no-golden", "-o", model.parent / "bundle", *arguments)
    assert (ran.code, ran.err) == (0, "")
    return Bundle.open(model.parent / "bundle").manifest.contract.model_dump(mode="json")


def test_fields_of_every_kind_are_set(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "mod-predictor-normed")
    before = convert(model)
    arguments = [
        "capacity=0.5",
        "gate=sigmoid",
        "decision.threshold=0.4",
        "cache.capacity=0.25",
        'thresholds={"1": 0.3}',
    ]
    after = convert(model, *(word for text in arguments for word in ("--set", text)))
    assert after == before | {
        "capacity": 0.5,
        "gate": "sigmoid",
        "decision": before["decision"] | {"threshold": 0.4},
        "cache": before["cache"] | {"capacity": 0.25},
        "thresholds": {"1": 0.3},
    }
    assert before["decision"]["rule"] == "predictor" and before["router_input"] == "normed"


def test_settings_of_one_object_come_together(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "mod-router")
    settings = ["--set", 'decision={"comparison": ">="}', "--set", "decision.threshold=0.4", "--set", "thresholds.3=1"]
    after = convert(model, *settings)
    assert after["decision"] == {"rule": "router", "threshold": 0.4, "comparison": ">="}
    assert after["thresholds"] == {"3": 1.0}


def test_a_contract_all_of_settings(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "mod-router")
    declared = convert(model)
    undeclared = checkpoint(tmp_path / "other" / "model", "mod-router", dynexport=None)
    line = error_of(dynexport("convert", undeclared, "-o", tmp_path / "none", "--no-golden"))
    assert "model.layers.1.mod_router.weight" in line and "they are routers of mod: declare all of them" in line
    assert "--strategy dense" in line
    ran = dynexport("convert", undeclared, "--strategy", "dense", "-o", tmp_path / "dense", "--no-golden")
    assert ran.code == 0 and ran.err.startswith("warning: left out: model.layers.1.mod_router.bias, ")
    assert ran.err.endswith("; --strategy dense was asked for\n")
    settings = ["--set", "routed_layers=[1,3]", "--set", "capacity=0.25"]
    assert convert(undeclared, "--strategy", "mod", *settings) == declared


def test_settings_of_other_strategies(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "skip-2x")
    ran = dynexport(
        "convert", model, "--no-golden", "-o", tmp_path / "b", "--set", "speedups=[2, 4]", "--set", "rule=official"
    )
    assert ran.code == 0 and "trained to skip layers as the ratio 4 (2 of 8 layers) does" in ran.err
    assert Bundle.open(tmp_path / "b").manifest.contract.model_dump()["speedups"] == (2.0, 4.0)


def astramind(model: Path) -> Path:
    """A checkpoint as the package mixture-of-depth would have written it."""

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".layers.1." in name or ".layers.3." in name]:
            head, part = name[:15], name[15:]  # "model.layers.1."
            router = part.startswith("mod_router.")
            part = part.replace("mod_router.", "router.weight_predictor.") if router else f"block.{part}"
            tensors[head + part] = tensors.pop(name)

    checkpoint(model, "mod-router", dynexport=None)
    change_tensors(model, rename)
    return model


def test_an_import_says_what_it_assumes_and_is_remembered(tmp_path: Path) -> None:
    model = astramind(tmp_path / "model")
    arguments = ["convert", model, "--import", "astramind", "--no-golden", "-o", tmp_path / "bundle"]
    ran = dynexport(*arguments)
    assert ran.code == 0
    assert [line.partition(":")[0] for line in ran.err.splitlines()] == ["warning"] * 2
    report = dynexport(*arguments, "--set", "decision.rule=router", "--json", "-").report
    assert [note.partition(":")[0] for note in report["notes"]] == ["capacity", "generated tokens"]
    assert ran.err.splitlines()[0] == f"warning: {report['notes'][0]}"
    assert (report["importer"], report["contract"]["combine"]) == ("astramind", "replace")
    assert report["contract"]["decision"]["rule"] == "router", "on top of what the import declares"
    assert Bundle.open(tmp_path / "bundle").manifest.source.importer == "astramind"
    assert dynexport("inspect", tmp_path / "bundle", "--json", "-").report["importer"] == "astramind"


def change(name: str, damage: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        changed = damage(tensors.pop(name))
        if changed is not None:
            tensors[name] = np.ascontiguousarray(changed)

    return lambda model: change_tensors(model, apply)


def contract(**fields: Any) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        path = model / "config.json"
        config = json.loads(path.read_text())
        config["dynexport"].update(fields)
        path.write_text(json.dumps(config))

    return write


def nothing(tensor: np.ndarray) -> None:
    return None


def with_nan(tensor: np.ndarray) -> np.ndarray:
    tensor.flat[0] = np.nan
    return tensor


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no router": (change(ROUTER, nothing), f"no tensor {ROUTER}"),
    "a router of another shape": (
        change(ROUTER, np.transpose),
        f"{ROUTER}: expected shape [1, 32] as config.json says",
    ),
    "a router's bias of another shape": (
        change("model.layers.1.mod_router.bias", lambda t: np.append(t, t)),
        "model.layers.1.mod_router.bias: expected shape [1] as config.json says, found [2]",
    ),
    "NaN in a router": (change(ROUTER, with_nan), f"tensor {ROUTER}: expected finite numbers, found NaN"),
    "no predictor": (change(FIRST, nothing), f"no tensor {FIRST}"),
    "half a predictor": (
        change(FIRST.replace("fc1", "fc2"), nothing),
        "no tensor model.layers.3.mod_predictor.fc2.weight",
    ),
    "a predictor of another shape": (change(FIRST, np.transpose), f"tensor {FIRST}: expected shape ["),
    "a predictor without a shape": (change(FIRST, lambda t: t[0, 0]), f"tensor {FIRST}: expected shape ["),
    "widths that differ": (
        change(FIRST.replace("fc1", "fc2"), lambda t: t[:, :5]),
        "mod_predictor.fc2.weight: expected shape [1, 12] as config.json says, found [1, 5]",
    ),
    "infinity in a predictor": (
        change(FIRST, lambda t: np.full_like(t, np.inf)),
        f"tensor {FIRST}: expected finite numbers, found NaN or infinity",
    ),
    "no capacity": (contract(capacity=0), "capacity: Input should be greater than 0, found 0"),
    "more than everything": (contract(capacity=1.5), "capacity: Input should be less than or equal to 1, found 1.5"),
    "a capacity of another type": (contract(capacity=True), "capacity: Input should be a valid number, found True"),
    "no room": (contract(cache={"capacity": -1}), "cache.capacity: Input should be greater than 0, found -1"),
    "an unknown overflow": (
        contract(cache={"overflow": "drop"}),
        "cache.overflow: Input should be 'residual' or 'error'",
    ),
    "a layer beyond the last": (contract(routed_layers=[1, 4]), "routed_layers: expected layers 0..3, found 4"),
    "a negative layer": (contract(routed_layers=[-1, 1]), "expected different layers from 0, found [-1, 1]"),
    "a layer twice": (contract(routed_layers=[1, 3, 1]), "expected different layers from 0, found [1, 3, 1]"),
    "no layer": (contract(routed_layers=[]), "routed_layers: Tuple should have at least 1 item"),
    "a layer without a router": (contract(routed_layers=[1, 2, 3]), "no tensor model.layers.2.mod_"),
    "a threshold of another layer": (contract(thresholds={"2": 0.5}), "thresholds: expected routed layers, found 2"),
    "a threshold of no layer": (contract(thresholds={"last": 0.5}), "thresholds.last"),
    "a threshold that is NaN": (
        contract(thresholds={"1": float("nan")}),
        "config.json: expected JSON, found something else (NaN is no number)",
    ),
    "an unknown rule": (
        contract(decision={"rule": "guess"}),
        "decision.rule: Input should be 'router', 'predictor' or",
    ),
    "an unknown comparison": (
        contract(decision={"comparison": "<"}),
        "decision.comparison: Input should be '>' or '>='",
    ),
    "an unknown prefill": (contract(prefill="all"), "prefill: Input should be 'causal' or 'topk', found 'all'"),
    "an unknown field": (contract(depth=2), "depth: Extra inputs are not permitted, found 2"),
}


@pytest.mark.parametrize(("damage", "expected"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_bad_routers_and_contracts(tmp_path: Path, damage: Callable[[Path], object], expected: str) -> None:
    model = checkpoint(tmp_path / "model", "mod-predictor-normed")
    damage(model)
    before = contents(tmp_path)
    assert expected in error_of(dynexport("convert", model, "--no-golden", "-o", tmp_path / "bundle"))
    assert contents(tmp_path) == before


ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "no value": (["--set", "capacity"], "Invalid value for --set: expected FIELD=VALUE, found 'capacity'"),
    "no name": (["--set", "=1"], "Invalid value for --set: expected FIELD=VALUE, found '=1'"),
    "half a name": (["--set", "decision.=1"], "Invalid value for --set: expected FIELD=VALUE, found 'decision.=1'"),
    "twice": (["--set", "capacity=1", "--set", "capacity=1"], "--set: expected capacity once, found it set twice"),
    "twice, once as an object": (
        ["--set", 'decision={"threshold": 1}', "--set", "decision.threshold=2"],
        "--set: expected decision.threshold once, found it set twice",
    ),
    "into what is no object": (
        ["--set", "decision=router", "--set", "decision.threshold=2"],
        "--set: expected decision.threshold once, found it set twice",
    ),
    "the strategy": (
        ["--set", "strategy=dense"],
        "strategy: expected mod among the fields to set, found 'dense'; choose",
    ),
    "an unknown field": (["--set", "depth=2"], "contract: mod.depth: Extra inputs are not permitted, found 2"),
    "an unknown field within": (["--set", "cache.size=2"], "contract: mod.cache.size: Extra inputs are not permitted"),
    "deeper than there is": (["--set", "capacity.share=1"], "mod.capacity: Input should be a valid number"),
    "text for a number": (["--set", "capacity=much"], "mod.capacity: Input should be a valid number, found 'much'"),
    "NaN": (["--set", "capacity=NaN"], "mod.capacity: Input should be"),
    "an infinite threshold": (
        ["--set", "decision.threshold=1e999"],
        "mod.decision.threshold: Input should be a valid number",
    ),
    "an object without end": (
        ["--set", "thresholds=" + '{"1":' * 5000],
        "mod.thresholds: Input should be a valid dict",
    ),
    "ratios": (["--speedup", "2"], "--speedup: expected with the strategy unified-skip"),
    "another strategy's contract": (["--strategy", "dense", "--set", "capacity=1"], "dense.capacity: Extra inputs are"),
    "no routers to import": (
        ["--import", "astramind"],
        "import astramind: expected routers as mixture-of-depth saves them",
    ),
    "an unknown import": (["--import", "guess"], "dlo, found 'guess'"),
}


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(tmp_path: Path, arguments: list[str], expected: str) -> None:
    model = checkpoint(tmp_path / "model", "mod-router")
    ran = dynexport("convert", model, "--no-golden", "-o", tmp_path / "bundle", *arguments)
    assert expected in error_of(ran)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_to_do_where_nothing_says_which_layers_are_routed(tmp_path: Path) -> None:
    for case, advice in (
        ("mod-router", "the checkpoint has routers in layers [1, 3]: --set 'routed_layers=[1, 3]'"),
        ("dense", "has no tensor model.layers.{i}.mod_router.weight either: add routers, or name the code"),
    ):
        model = checkpoint(tmp_path / case, case, dynexport=None)
        message = error_of(dynexport("convert", model, "--strategy", "mod", "-o", tmp_path / "bundle"))
        assert "routed_layers: expected the layers with a router" in message and advice in message
        assert not (tmp_path / "bundle").exists()
