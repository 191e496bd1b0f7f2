"""The importer for the package mixture-of-depth: names, contract, notes and errors; then its arithmetic.

No trained checkpoint of the package is at hand, so the tests write one. How it looks is known from running the package
once: version 1.2.0 with transformers 4.41.2, ``apply_mod_to_hf`` on a tiny LlamaForCausalLM, then ``save_pretrained``.
That wrote the config below, where "MoD" in the class name is all that tells, and for every odd layer its usual tensors
under ``model.layers.{i}.block.`` and a router under ``model.layers.{i}.router.weight_predictor.``; all else as usual.
The package then loaded what ``directory`` writes, with no key missing and none left over, and computed ``GOLDEN`` from
it. ``PackageModel`` is its arithmetic in numpy, held to these, for everything that needs more than a few numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported_bundle import ImportedBundle
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dynexport.exporter.checkpoint import Checkpoint, open_checkpoint
from dynexport.exporter.families import read_architecture
from dynexport.exporter.strategies.importing import find_importer, importers, open_imported
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.runtime.bundle.contract import Mod, parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.mod_fields import Decision

Tensors = dict[str, np.ndarray]
Chosen = NDArray[np.bool_]

ROUTED = (1, 3)
HIDDEN, HEAD_DIM = 32, 8
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaMoDForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 97,
}


SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (16, HIDDEN),
    "self_attn.v_proj": (16, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (44, HIDDEN),
    "mlp.up_proj": (44, HIDDEN),
    "mlp.down_proj": (HIDDEN, 44),
}
# (prompt, generated tokens) -> the first logits of the last token, as the package itself has computed them.
GOLDEN = {
    (12, 0): [-0.55257, 0.14771, 0.74964, -1.056, 0.40404],
    (15, 0): [4.01824, 0.13284, -0.72046, -1.75479, -0.7003],
    (9, 6): [1.1481, -0.1702, -2.51759, -1.33094, -1.89965],
    (16, 0): [-0.60825, -0.78374, -1.41136, -1.4751, -1.42841],
    (25, 0): [-0.549, -2.15391, -0.15267, -1.24346, -1.2373],
    (40, 0): [2.73613, -1.221, -2.73185, -0.71255, -0.79463],
}


def stored_name(name: str) -> str:
    """A tensor of the usual model as the package stores it."""
    for layer in ROUTED:
        name = name.replace(f"model.layers.{layer}.", f"model.layers.{layer}.block.")
    return name


@pytest.fixture
def tensors() -> Tensors:
    """What the package would store of a tiny llama."""
    shapes = {"model.embed_tokens": (97, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (97, HIDDEN)}
    for layer in range(4):
        shapes |= {stored_name(f"model.layers.{layer}.{name}"): shape for name, shape in SHAPES.items()}
    random = np.random.RandomState(5)  # its numbers never change, so the golden ones stay true
    stored = {
        f"{name}.weight": 0.2 * random.standard_normal(shape) + ("norm" in name) for name, shape in shapes.items()
    }
    for layer in ROUTED:
        router = f"model.layers.{layer}.router.weight_predictor."
        stored[router + "weight"] = 0.3 * random.standard_normal((1, HIDDEN))
        stored[router + "bias"] = 0.3 * random.standard_normal(1)
    return {name: value.astype(np.float32) for name, value in stored.items()}


def some_tokens(count: int) -> list[int]:
    return [(31 * i + i * i) % 97 for i in range(count)]


@pytest.fixture
def directory(tmp_path: Path, tensors: Tensors) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path)
    return tmp_path


def write_config(directory: Path, **fields: Any) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))


def imported(directory: Path) -> Checkpoint:
    return open_checkpoint(directory, importer=find_importer("astramind"))


def contract_of(checkpoint: Checkpoint) -> Mod:
    contract = parse_contract(checkpoint.config["dynexport"], "config.json")
    assert isinstance(contract, Mod)
    return contract


def error_of(action: Callable[[], object]) -> str:
    """The message of the DynexportError, which must be one line."""
    with pytest.raises(DynexportError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tensors_have_the_usual_names(directory: Path, tensors: Tensors, saved_model: Callable[[str], Path]) -> None:
    checkpoint = imported(directory)  # of the same sizes as the tiny llama
    usual = load_file(saved_model("llama") / "model.safetensors")
    routers = {f"model.layers.{i}.mod_router.{kind}" for i in ROUTED for kind in ("weight", "bias")}
    assert set(checkpoint.names) == set(usual) | routers
    for name in checkpoint.names:
        stored = name.replace("mod_router.", "router.weight_predictor.") if name in routers else stored_name(name)
        assert checkpoint.shape(name) == tensors[stored].shape
        assert name in routers or checkpoint.shape(name) == usual[name].shape
        np.testing.assert_array_equal(checkpoint.read(name), tensors[stored])
    assert checkpoint.shape("model.layers.1.mod_router.weight") == (1, HIDDEN)


def test_stored_names_are_gone(directory: Path) -> None:
    checkpoint = imported(directory)
    name = "model.layers.1.block.mlp.up_proj.weight"
    assert f"no tensor {name}" in error_of(lambda: checkpoint.read(name))
    assert f"no tensor {name}" in error_of(lambda: checkpoint.shape(name))


def test_config_and_contract(directory: Path) -> None:
    checkpoint = imported(directory)
    assert checkpoint.source == str(directory)
    kept = {name: value for name, value in CONFIG.items() if name != "architectures"}
    assert {name: value for name, value in checkpoint.config.items() if name != "dynexport"} == kept
    assert read_architecture(checkpoint.config).layers == 4
    assert contract_of(checkpoint) == Mod(
        routed_layers=ROUTED,
        capacity=0.125,
        rounding="floor",
        router_input="hidden",
        gate="raw",
        combine="replace",
        decision=Decision(rule="always"),
        prefill="topk",
        positions="original",
        boundary="k-1",
    )


def test_carried_files(directory: Path) -> None:
    (directory / "generation_config.json").write_text("{}")
    assert imported(directory).files == {"generation_config.json": b"{}"}


def test_notes_tell_every_choice(directory: Path) -> None:
    notes = imported(directory).notes
    assert [note.partition(":")[0] for note in notes] == ["capacity", "generated tokens"]
    assert not any("\n" in note for note in notes)
    assert open_checkpoint(directory).notes == ()


@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
def test_note_on_half_precision(directory: Path, field: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "torch_dtype"}
    (directory / "config.json").write_text(json.dumps(config | {field: "bfloat16"}))
    assert "rounds them to bfloat16" in imported(directory).notes[-1]


def test_config_may_choose_what_the_package_leaves_open(directory: Path) -> None:
    chosen = {
        "strategy": "mod",
        "capacity": 0.25,
        "prefill": "causal",
        "decision": {"rule": "router", "threshold": 0.6},
        "thresholds": {"3": 0.7},
    }
    write_config(directory, dynexport=chosen)
    checkpoint = imported(directory)
    contract = contract_of(checkpoint)
    assert (contract.capacity, contract.prefill, contract.decision.rule) == (0.25, "causal", "router")
    assert (contract.threshold(1), contract.threshold(3)) == (0.6, 0.7)
    assert (contract.gate, contract.combine, contract.routed_layers) == ("raw", "replace", ROUTED)
    assert checkpoint.notes == ()


@pytest.mark.parametrize(
    ("dynexport", "expected"),
    [
        ({"strategy": "dense"}, "dynexport.strategy: expected 'mod'"),
        ({"combine": "delta"}, "dynexport.combine: expected 'replace'"),
        ({"gate": "sigmoid"}, "dynexport.gate: expected 'raw'"),
        ({"routed_layers": [1]}, "dynexport.routed_layers: expected [1, 3]"),
        ([], "dynexport: expected an object"),
        (None, "dynexport: expected an object"),
    ],
)
def test_config_may_not_contradict_the_package(directory: Path, dynexport: object, expected: str) -> None:
    write_config(directory, dynexport=dynexport)
    assert expected in error_of(lambda: imported(directory))


ROUTER = "model.layers.3.router.weight_predictor."


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({ROUTER + "weight": None}, f"tensor {ROUTER}weight: expected shape [1, 32]"),
        ({ROUTER + "bias": None}, f"tensor {ROUTER}bias: expected shape [1]"),
        ({ROUTER + "weight": (1, 31)}, f"tensor {ROUTER}weight: expected shape [1, 32]"),
        ({ROUTER + "weight": (32,)}, "found [32]"),
        ({ROUTER + "bias": (2,)}, f"tensor {ROUTER}bias: expected shape [1]"),
        ({ROUTER + "bias": ()}, "found []"),
        ({"model.layers.3.router.gate.weight": (1, 32)}, "tensor model.layers.3.router.gate.weight: expected"),
        ({"model.layers.1.mlp.up_proj.weight": (44, 32)}, "mixes two checkpoints"),
        ({"model.layers.2.router.weight_predictor.weight": (1, 32)}, "layers.2.router.weight_predictor.bias"),
        (
            {f"model.layers.2.router.weight_predictor.{k}": s for k, s in (("weight", (1, 32)), ("bias", (1,)))},
            "layer 2",
        ),
        ({"model.layers.2.block.mlp.up_proj.bias": (44,)}, "layers.2.router.weight_predictor.weight"),
    ],
)
def test_incomplete_or_misshapen(directory: Path, tensors: Tensors, changes: dict[str, Any], expected: str) -> None:
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, directory / "model.safetensors")
    message = error_of(lambda: imported(directory))
    assert expected in message and str(directory) in message and "expected" in message and "found" in message


@pytest.mark.parametrize("hidden", [None, "32", 64, [32]])
def test_config_of_another_size(directory: Path, hidden: object) -> None:
    write_config(directory, hidden_size=hidden)
    assert "router.weight_predictor.weight: expected shape [1, " in error_of(lambda: imported(directory))


def test_no_router(saved_model: Callable[[str], Path]) -> None:
    message = error_of(lambda: imported(saved_model("llama")))
    assert "expected routers" in message and "found none among 39 tensors" in message


def test_unknown_importer() -> None:
    message = error_of(lambda: find_importer("sramshetty"))
    assert message == f"import: expected {' or '.join(importers())}, found 'sramshetty'"


def test_it_is_known_by_its_tensors(directory: Path) -> None:
    assert open_imported(directory).importer == "astramind"


def test_pickles_stay_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickles can run code" in error_of(lambda: imported(directory))


def test_gguf_has_no_routers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynexport.exporter import checkpoint as package

    (directory / "model.gguf").touch()
    monkeypatch.setattr(package, "GgufFile", lambda path, source, build_tokenizer: _Named(source))
    assert "found a .gguf file" in error_of(lambda: imported(directory / "model.gguf"))


class _Named(Checkpoint):
    """A checkpoint of which nothing but its name is asked."""

    names = ()

    def __init__(self, source: str) -> None:
        self.source = source

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def read(self, name: str) -> np.ndarray:
        raise NotImplementedError


class PackageModel:
    """The package's model in numpy, float64, one row, from the tensors as it stores them."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def logits(self, tokens: list[int], prompt: int) -> tuple[np.ndarray, Chosen]:
        """Logits [tokens, vocabulary] and the chosen tokens [routed layers, tokens].

        The package sees the first ``prompt`` tokens at once, then one at a time with a cache. So which tokens have
        entries in a layer is settled once, and no token attends to a later one: one pass computes what they do.
        """
        h = self._tensors["model.embed_tokens.weight"][tokens]
        positions = np.arange(len(tokens))
        routes = []
        for layer in range(4):
            name = f"model.layers.{layer}."
            if layer not in ROUTED:
                h = self._layer(name, h, positions)
                continue
            score = h @ self._tensors[name + "router.weight_predictor.weight"][0]
            score += self._tensors[name + "router.weight_predictor.bias"]
            chosen = np.concatenate([choose(score[:prompt]), *(choose(score[i : i + 1]) for i in positions[prompt:])])
            h[chosen] = score[chosen, None] * self._layer(name + "block.", h[chosen], positions[chosen])
            routes.append(chosen)
        return self._norm("model.norm", h) @ self._tensors["lm_head.weight"].T, np.stack(routes)

    def _layer(self, name: str, h: np.ndarray, positions: np.ndarray) -> np.ndarray:
        x = self._norm(name + "input_layernorm", h)
        q, k, v = (self._linear(f"{name}self_attn.{kind}_proj", x).reshape(len(h), -1, HEAD_DIM) for kind in "qkv")
        q, k, v = rotate(q, positions), np.repeat(rotate(k, positions), 2, 1), np.repeat(v, 2, 1)
        seen = positions <= positions[:, None]
        weights = np.exp(np.where(seen, np.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5, -np.inf))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        h = h + self._linear(name + "self_attn.o_proj", attended.reshape(len(h), -1))
        x = self._norm(name + "post_attention_layernorm", h)
        gate = self._linear(name + "mlp.gate_proj", x)
        gate = gate / (1 + np.exp(-gate))
        return h + self._linear(name + "mlp.down_proj", gate * self._linear(name + "mlp.up_proj", x))

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self._tensors[name + ".weight"].T

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"])
        return self._tensors[name + ".weight"] * x / scale


def choose(score: np.ndarray) -> Chosen:
    """The package's selection among the tokens of one forward pass: strictly above the k-th score, unless k is 1."""
    k = max(1, int(0.125 * len(score)))
    kth = np.sort(score)[-k]
    return score > kth if k > 1 else score >= kth


def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [tokens, heads, HEAD_DIM]."""
    half = HEAD_DIM // 2
    angle = (positions[:, None] / CONFIG["rope_theta"] ** (np.arange(half) / half))[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


@pytest.mark.parametrize(("prompt", "generated"), GOLDEN)
def test_numpy_agrees_with_the_package(tensors: Tensors, prompt: int, generated: int) -> None:
    logits, _ = PackageModel(tensors).logits(some_tokens(prompt + generated), prompt)
    np.testing.assert_allclose(logits[-1, :5], GOLDEN[prompt, generated], atol=5e-5)


def run_reference(directory: Path, tokens: list[int], prompt: int) -> tuple[np.ndarray, Chosen]:
    checkpoint = imported(directory)
    reference = ModReference.from_checkpoint(checkpoint, contract=contract_of(checkpoint), max_length=64)
    logits, routes = reference.routed_logits([tokens], [[(0, prompt)]])
    return logits[0], routes[0].chosen


@pytest.mark.parametrize(("prompt", "generated"), [(1, 0), (12, 0), (15, 0), (9, 6), (1, 5), (16, 0), (25, 3), (40, 0)])
def test_agrees_with_the_package(directory: Path, tensors: Tensors, prompt: int, generated: int) -> None:
    tokens = some_tokens(prompt + generated)
    expected, routes = PackageModel(tensors).logits(tokens, prompt)
    logits, chosen = run_reference(directory, tokens, prompt)
    np.testing.assert_array_equal(chosen, routes)
    assert (chosen[:, :prompt].sum(axis=1) == max(1, prompt // 8 - 1)).all() and chosen[:, prompt:].all()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
def test_a_bundle_answers_as_the_package(directory: Path, tensors: Tensors, static: bool, tmp_path: Path) -> None:
    bundle = ImportedBundle(directory, tmp_path / "bundle", static=static)
    assert bundle.importer == "astramind"
    for prompt, generated in ((16, 3), (25, 3), (7, 2)):
        rows = [some_tokens(prompt + generated), [3, *some_tokens(prompt + generated - 1)]]
        for row, (logits, chosen) in zip(rows, bundle.answer(rows, prompt), strict=True):
            expected, routes = PackageModel(tensors).logits(row, prompt)
            np.testing.assert_array_equal(chosen, routes)
            np.testing.assert_allclose(logits, expected, atol=1e-4)
