"""Layers of which tokens skip parts, each form of router, and whole sequences, against PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed import CONTEXT, Talk, compare
from safetensors.numpy import load_file, save_file
from tiny_models import LAYERS

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.parity import verify
from dynexport.exporter.parity.constants import differences
from dynexport.exporter.reference import RowRoutes
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.cost import read_bytes

pytest.importorskip("transformers")

WIDTH = 12
CONTRACTS: dict[str, dict[str, Any]] = {
    "flexidepth": {
        "skipped_kv": "own",
        "skip_branch": "adapter",
        "gate": "split",
        "router": {"kind": "bottleneck"},
        "router_input": "normed",
    },
    "flexidepth-hard": {
        "skipped_kv": "own",
        "skip_branch": "adapter",
        "gate": "none",
        "router": {"kind": "bottleneck"},
    },
    "block-own-delta": {"skipped_kv": "own", "gate": "sigmoid", "routed_layers": [0, 1]},
    "block-own-replace": {"skipped_kv": "own", "gate": "sigmoid", "combine": "replace"},
    "skipgpt": {
        "target": "attention+mlp",
        "skipped_kv": "own",
        "gate": "none",
        "router": {"kind": "pair"},
        "decision": {"comparison": ">="},
    },
    "both-gated-without-entries": {
        "target": "attention+mlp",
        "gate": "raw",
        "router": {"kind": "pair"},
        "cache": {"capacity": 0.25},
    },
    "both-affine-first": {"target": "attention+mlp", "gate": "affine", "affine": [0.5, 0.75], "keep_first": 3},
    "d-llm": {"gate": "none", "keep_first": 2, "router": {"kind": "mlp", "epsilon": 1e-4}},
    "relu": {"router": {"kind": "mlp", "activation": "relu"}, "skipped_kv": "own", "target": "attention"},
    "mlp-adapter": {"target": "mlp", "skip_branch": "adapter", "gate": "split"},
    "mlp": {"target": "mlp", "gate": "raw", "routed_layers": [0, 1, 2, 3], "keep_first": 1},
    "attention-compact": {"target": "attention", "gate": "sigmoid", "positions": "compact"},
    "attention-predictor": {"target": "attention", "gate": "none", "decision": {"rule": "predictor"}},
    "mindskip": {"level": "sequence", "target": "attention", "router_input": "normed", "gate": "none"},
    "sequence-block": {"level": "sequence", "gate": "none", "router": {"kind": "mlp"}, "routed_layers": [0, 2]},
    "dlo": {"gate": "affine", "affine": [0.975, 0.05]},
    "adapter-without-entries": {"gate": "split", "skip_branch": "adapter"},
    "astramind": {"prefill": "topk", "boundary": "k-1", "capacity": 0.4, "combine": "replace", "gate": "sigmoid"},
}
STATIC = ("attention-compact", "dlo", "astramind", "d-llm")
TALK = Talk.random((1, 2, 5, 17, 33), (4,) * 5, (6, 1, 3, 5, 2), (3,) * 5)

Golden = tuple[ModReference, list[tuple[np.ndarray, RowRoutes]]]


@pytest.fixture(scope="module")
def model_of(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def save(contract: str, family: str = "llama") -> Path:
        directory = tmp_path_factory.mktemp("parts") / "model"
        save_parts(directory, saved_model(family), {"strategy": "mod", "routed_layers": [1, 3], **CONTRACTS[contract]})
        return directory

    return save


def save_parts(directory: Path, model: Path, contract: dict[str, Any], *, seed: int = 9) -> None:
    """Save a copy of a model with the tensors that a contract needs, random, so that decisions vary."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    hidden, random = config["hidden_size"], np.random.default_rng(seed)
    kind = contract.get("router", {}).get("kind", "linear")
    rows = 2 if kind == "pair" else 1
    router: dict[str, tuple[int, ...]] = {"weight": (rows, hidden), "bias": (rows,)}
    if kind in ("bottleneck", "mlp"):
        router = {"fc1.weight": (WIDTH, hidden), "norm.weight": (WIDTH,), "fc2.weight": (1, WIDTH)}
        router |= {} if kind == "bottleneck" else {"fc1.bias": (WIDTH,), "fc2.bias": (1,)}
        if contract["router"].get("activation") == "relu":
            del router["norm.weight"]
    shapes = {f"mod_router.{name}": shape for name, shape in router.items()}
    if contract.get("target") == "attention+mlp":
        shapes |= {f"mod_mlp_router.{name}": shape for name, shape in router.items()}
    if contract.get("skip_branch") == "adapter":
        shapes |= {f"mod_adapter.{part}_proj.weight": (WIDTH, hidden) for part in ("gate", "up")}
        shapes["mod_adapter.down_proj.weight"] = (hidden, WIDTH)
    if contract.get("decision", {}).get("rule") == "predictor":
        shapes |= {"mod_predictor.fc1.weight": (WIDTH, hidden), "mod_predictor.fc1.bias": (WIDTH,)}
        shapes |= {"mod_predictor.fc2.weight": (1, WIDTH), "mod_predictor.fc2.bias": (1,)}
    tensors = load_file(directory / "model.safetensors")
    for layer in contract["routed_layers"]:
        for name, shape in shapes.items():
            value = random.standard_normal(shape).astype(np.float32) * np.float32(0.3 if len(shape) == 2 else 0.1)
            tensors[f"model.layers.{layer}.{name}"] = value + np.float32(name.endswith("norm.weight"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"dynexport": contract}))


@pytest.fixture(scope="module")
def golden(model_of: Callable[..., Path]) -> Callable[..., Golden]:
    @cache
    def answer(contract: str, family: str = "llama") -> Golden:
        checkpoint = open_checkpoint(model_of(contract, family))
        fields = parse_contract(checkpoint.config["dynexport"], "test")
        model = ModReference.from_checkpoint(checkpoint, contract=fields, max_length=CONTEXT)
        return model, list(zip(*model.routed_logits(TALK.rows, TALK.prompted), strict=True))

    return answer


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_conversation_is_pytorchs(
    contract: str, golden: Callable[..., Golden], model_of: Callable[..., Path], tmp_path: Path
) -> None:
    convert(model_of(contract), tmp_path / "bundle", max_length=CONTEXT, golden=False)
    compare(golden(contract), Executor(Bundle.open(tmp_path / "bundle"), threads=1), TALK)


@pytest.mark.parametrize("contract", STATIC)
def test_without_conditions(
    contract: str, golden: Callable[..., Golden], model_of: Callable[..., Path], tmp_path: Path
) -> None:
    convert(model_of(contract), tmp_path / "bundle", max_length=CONTEXT, golden=False, static=True)
    compare(golden(contract), Executor(Bundle.open(tmp_path / "bundle"), threads=1), TALK)


def test_a_router_may_have_an_epsilon_of_its_own(model_of: Callable[..., Path], tmp_path: Path) -> None:
    convert(model_of("d-llm"), tmp_path / "bundle", max_length=CONTEXT, golden=False)
    bundle = Bundle.open(tmp_path / "bundle")
    assert differences(bundle) == []
    router = bundle.manifest.contract.router.model_copy(update={"epsilon": None})
    contract = bundle.manifest.contract.model_copy(update={"router": router})
    bundle.manifest = bundle.manifest.model_copy(update={"contract": contract})
    found = differences(bundle)
    assert len(found) == 2 and "layer 1: RMSNormalization: epsilon" in found[0], found


@pytest.mark.parametrize(("contract", "target"), [("block-own-replace", "onnxruntime"), ("astramind", "tensorrt")])
def test_a_gate_near_zero_that_replaces_hidden_states_is_pytorchs(
    contract: str, target: Any, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    """ONNX Runtime's Sigmoid has no correct digit below -16, and the norms that follow take the gate's size away."""
    shutil.copytree(model_of(contract), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in tensors:
        if "mod_router" in name:
            tensors[name] = 6 * tensors[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "model", tmp_path / "bundle", max_length=CONTEXT, golden=False, target=target)
    report = verify(tmp_path / "bundle", tmp_path / "model", new_tokens=2, threads=1)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert any(check.name == "full_caches/steps" for check in report.checks), "tokens with the smallest gates run, too"


def test_dynexport_products_end_the_search_for_constants(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Top-k's share stands before the layers, whose last product is one of dynexport's operators."""
    convert(
        model_of("astramind"), tmp_path / "bundle", max_length=CONTEXT, golden=False, plugins=True, precision="int8"
    )
    bundle = Bundle.open(tmp_path / "bundle")
    assert "BlockMatMul" in bundle.manifest.operators
    assert differences(bundle) == []


def test_decisions_vary(golden: Callable[..., Golden]) -> None:
    for contract in CONTRACTS:
        _, expected = golden(contract)
        share = np.concatenate([routes.chosen for _, routes in expected], axis=1).mean(axis=1)
        assert (share > 0.02).all() and (share < 0.98).any(), contract
    assert LAYERS == 4


@pytest.mark.parametrize("contract", ["flexidepth", "mlp-adapter", "both-gated-without-entries", "mindskip"])
def test_verify_passes_and_finds_a_fault(contract: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """The fault: a tensor of the skip branch or of the second router, or else the router, is another one."""
    convert(model_of(contract), tmp_path / "bundle", max_length=CONTEXT)
    report = verify(tmp_path / "bundle", model_of(contract), new_tokens=6, threads=1)
    assert report.passed, report
    shutil.copytree(model_of(contract), tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = next(
        f"model.layers.3.{name}.weight"
        for name in ("mod_adapter.down_proj", "mod_mlp_router", "mod_router")
        if f"model.layers.3.{name}.weight" in tensors
    )
    tensors[name] = -tensors[name]
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert not verify(tmp_path / "bundle", tmp_path / "other", new_tokens=6, threads=1).passed


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"static": True}, "skipped_kv: expected none for --static"),
        ({"target": "mlp", "skipped_kv": "none"}, {"target": "tensorrt"}, "target: expected block for TensorRT"),
        ({}, {"kv_cache_dtype": "int8"}, "tokens that skip attention append their entries without it"),
    ],
)
def test_what_no_graph_does_is_refused_by_name(
    fields: dict[str, Any], options: dict[str, Any], message: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DynexportError) as caught:
        convert(model_of("flexidepth"), tmp_path / "bundle", fields=fields, golden=False, **options)
    assert message in str(caught.value)


def test_a_step_reads_the_bytes_of_what_runs(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Skipping everything leaves keys, values, routers and adapters, and the caches of the other layers."""
    convert(model_of("flexidepth"), tmp_path / "bundle", max_length=CONTEXT, golden=False)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    reader, entries = DecisionReader(manifest), np.full((LAYERS, 1), 5)
    active, nothing = np.ones(LAYERS, bool), np.zeros((2, 1), np.float32)

    def read(*runs: int) -> int:
        row = reader.of_row(np.array(runs)[:, None], nothing, nothing, np.zeros(2, np.int64), active)
        return read_bytes(manifest, [row], entries)[0]

    hidden, inner, heads, kv, cost = 32, 44, 4 * 8, 2 * 2 * 8, manifest.cost
    layer = 4 * (hidden * (2 * heads + kv + 3 * inner + WIDTH) + 2 * hidden + 2 * WIDTH)
    caches = LAYERS * 6 * cost.kv_per_token
    assert cost.layers[1] == layer and cost.kv_per_token == 4 * kv
    assert read(1, 1) == cost.shared + sum(cost.layers) + caches
    saved = 4 * (hidden * (2 * heads + 3 * inner) + hidden) + 6 * cost.kv_per_token
    assert read(1, 0) == read(0, 1) == read(1, 1) - saved + 4 * 3 * hidden * WIDTH
