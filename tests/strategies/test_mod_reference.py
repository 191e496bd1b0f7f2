"""The golden of Mixture-of-Depths: what the contract says of it, the conformance set, and training beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import LAYERS, VOCABULARY, InMemory, mod_tensors, random_rows

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.reference.rows import RowRoutes
from dynexport.exporter.strategies.mod.reference import ModReference, top_k, top_k_count
from dynexport.runtime.bundle.contract import Mod, parse_contract
from dynexport.runtime.bundle.errors import DynexportError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch as safetensors_torch  # noqa: E402

from dynexport.exporter.strategies.mod.training import (  # noqa: E402
    add_routers,
    auxiliary_loss,
    contract_tensors,
    top_k_routing,
)

CONFORMANCE = sorted(path.parent for path in Path(__file__).parents[1].glob("conformance/mod-*/expected.json"))
FAMILIES = ("llama", "gpt2", "gemma2", "bloom")
MAX_LENGTH = 32
ROUTED = (1, 3)
SavedModel = Callable[[str], Path]
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Routed(InMemory):
    """A tiny model with routers and predictors for the layers of ``ROUTED``."""

    def __init__(self, directory: Path, **instead: np.ndarray | None) -> None:
        super().__init__(directory)
        self.tensors |= mod_tensors(ROUTED, self.hidden, np.random.default_rng(7))
        for name, tensor in instead.items():
            del self.tensors[name]
            if tensor is not None:
                self.tensors[name] = tensor


def mod(**fields: Any) -> Mod:
    contract = parse_contract({"strategy": "mod", "routed_layers": ROUTED, **fields}, "test")
    assert isinstance(contract, Mod)
    return contract


def reference(checkpoint: Checkpoint, **fields: Any) -> ModReference:
    return ModReference.from_checkpoint(checkpoint, contract=mod(**fields), max_length=MAX_LENGTH)


def with_scores(directory: Path, score: float) -> Routed:
    """Every router says ``score`` of every token."""
    checkpoint = Routed(directory)
    for layer in ROUTED:
        checkpoint.tensors[f"model.layers.{layer}.mod_router.weight"][:] = 0
        checkpoint.tensors[f"model.layers.{layer}.mod_router.bias"][:] = score
    return checkpoint


def run_one(model: ModReference, row: list[int], prompt: int | None = None) -> tuple[np.ndarray, RowRoutes]:
    [logits], [routes] = model.routed_logits([row], [[(0, len(row) if prompt is None else prompt)]])
    return logits, routes


FORMS = st.fixed_dictionaries(
    {
        "gate": st.sampled_from(["raw", "sigmoid", "none"]),
        "combine": st.sampled_from(["delta", "replace"]),
        "router_input": st.sampled_from(["hidden", "normed"]),
        "positions": st.sampled_from(["original", "compact"]),
    }
)
DECISIONS = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(["router", "predictor", "always"]),
        "comparison": st.sampled_from([">", ">="]),
        "threshold": st.sampled_from([0.3, 0.5, 0.6]),
    }
)
ROWS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)


# The conformance set.


@pytest.mark.parametrize("directory", CONFORMANCE, ids=lambda path: path.name)
@pytest.mark.parametrize("streaming", [False, True], ids=["resident", "streaming"])
def test_answers_of_an_independent_implementation(directory: Path, streaming: bool) -> None:
    checkpoint, expected = open_checkpoint(str(directory)), json.loads((directory / "expected.json").read_text())
    contract = parse_contract(checkpoint.config["dynexport"], str(directory))
    assert isinstance(contract, Mod)
    model = ModReference.from_checkpoint(
        checkpoint, streaming=streaming, contract=contract, max_length=expected["max_length"]
    )
    rows = [run["prompt"] + run["greedy"][:-1] for run in expected["runs"]]
    logits, routes = model.routed_logits(rows, [[(0, len(run["prompt"]))] for run in expected["runs"]])
    for run, row_logits, row_routes in zip(expected["runs"], logits, routes, strict=True):
        prompt = len(run["prompt"])
        assert np.abs(row_logits[prompt - 1] - run["last_prompt_logits"]).max() < 1e-4
        decided = np.array(run["logit_margins"]) >= 2e-3
        assert (row_logits[prompt - 1 :].argmax(-1) == run["greedy"])[decided].all()
        same = row_routes.chosen == np.array(run["routes"], bool).T
        assert same[row_routes.margin >= 1e-5].all()
        assert row_routes.overflow.sum() == run["overflow"]


# What the contract says.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{"prefill": "topk", "capacity": 1.0}, {"decision": {"rule": "always"}}])
def test_everything_chosen_without_a_gate_is_the_dense_model(
    saved_model: SavedModel, family: str, fields: dict[str, Any]
) -> None:
    checkpoint, rows = Routed(saved_model(family)), random_rows(13, 1, 7)
    model = reference(checkpoint, gate="none", **fields)
    logits, routes = model.routed_logits(rows, [[(0, len(row))] for row in rows])
    for found, expected, row in zip(logits, Reference.from_checkpoint(checkpoint).logits(rows), routes, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert row.chosen.all() and not row.overflow.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_without_a_gate_are_those_of_the_plain_reference(saved_model: SavedModel, family: str) -> None:
    checkpoint, [row] = Routed(saved_model(family)), random_rows(17)
    logits, routes = run_one(reference(checkpoint, gate="none"), row)
    assert 0 < routes.chosen.sum() < routes.chosen.size
    runs = np.ones((LAYERS, len(row)), bool)
    runs[list(ROUTED)] = routes.chosen
    [expected] = Reference.from_checkpoint(checkpoint).logits([row], [runs])
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@quick
@given(row=ROWS, form=FORMS, data=st.data())
def test_a_token_that_is_not_chosen_stays_as_it_was(
    saved_model: SavedModel, row: list[int], form: dict[str, Any], data: st.DataObject
) -> None:
    forced = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=len(row), max_size=len(row)), min_size=2, max_size=2))
    )
    model = reference(Routed(saved_model("llama")), **form)
    [hidden], [routes] = model.routed_layer_outputs([row], [[(0, len(row))]], [forced])
    np.testing.assert_array_equal(routes.chosen, forced)
    for layer, chosen in zip(ROUTED, forced, strict=True):
        np.testing.assert_array_equal(hidden[layer][~chosen], hidden[layer - 1][~chosen])
        assert (hidden[layer][chosen] != hidden[layer - 1][chosen]).any(axis=-1).all()


@quick
@given(row=ROWS.filter(lambda row: len(row) > 1), form=FORMS, decision=DECISIONS, data=st.data())
def test_what_follows_changes_nothing(
    saved_model: SavedModel, row: list[int], form: dict[str, Any], decision: dict[str, Any], data: st.DataObject
) -> None:
    """So a prefill gives what single steps give, a full cache included."""
    family = data.draw(st.sampled_from(FAMILIES))
    model = reference(Routed(saved_model(family)), **form, decision=decision, cache={"capacity": 0.25})
    logits, routes = run_one(model, row)
    length = data.draw(st.integers(1, len(row) - 1))
    before, routes_before = run_one(model, row[:length])
    assume(routes.margin.min() > 1e-5)  # rounding decides nearer ones
    np.testing.assert_allclose(before, logits[:length], atol=2e-5)
    np.testing.assert_array_equal(routes_before.chosen, routes.chosen[:, :length])
    np.testing.assert_array_equal(before, model.logits([row[:length]])[0])


@given(
    score=st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), min_size=1, max_size=40),
    capacity=st.sampled_from([0.01, 0.125, 0.3, 0.5, 1.0]),
    rounding=st.sampled_from(["floor", "ceil"]),
)
def test_top_k_takes_the_largest_and_on_ties_the_first(score: list[float], capacity: float, rounding: str) -> None:
    contract = mod(capacity=capacity, rounding=rounding)
    chosen, margin = top_k(contract, np.array(score, np.float32))
    assert chosen.sum() == top_k_count(contract, len(score)) >= 1
    worst = min(np.array(score)[chosen])
    assert all(worst >= value for value in np.array(score)[~chosen])
    ties = chosen[np.array(score) == worst]
    assert (np.sort(ties)[::-1] == ties).all()
    assert (margin >= 0).all()


@pytest.mark.parametrize(
    ("capacity", "rounding", "tokens", "expected"),
    [
        (0.125, "floor", 7, 1),
        (0.125, "floor", 23, 2),
        (0.125, "ceil", 17, 3),
        (0.29, "floor", 100, 29),
        (0.07, "ceil", 100, 7),
    ],
)
def test_top_k_counts_with_decimals(capacity: float, rounding: str, tokens: int, expected: int) -> None:
    assert top_k_count(mod(capacity=capacity, rounding=rounding), tokens) == expected


def test_every_prompt_span_chooses_among_its_own_and_the_rest_decides_causally(saved_model: SavedModel) -> None:
    [row] = random_rows(20)
    checkpoint = Routed(saved_model("llama"))
    causal = reference(checkpoint, capacity=0.25)
    model = reference(checkpoint, capacity=0.25, prefill="topk")
    _, [routes] = model.routed_logits([row], [[(0, 8), (12, 16)]])
    for chosen, score in zip(routes.chosen, routes.score, strict=True):
        np.testing.assert_array_equal(chosen[:8], top_k(model._contract, score[:8])[0])
        np.testing.assert_array_equal(chosen[12:16], top_k(model._contract, score[12:16])[0])
        for start, stop in ((8, 12), (16, 20)):
            np.testing.assert_array_equal(chosen[start:stop], score[start:stop] > 0)
    _, [without] = model.routed_logits([row], [[]])
    np.testing.assert_array_equal(without.chosen, run_one(causal, row)[1].chosen)


@quick
@given(row=ROWS, capacity=st.sampled_from([0.05, 0.125, 0.3, 1.0]), data=st.data())
def test_a_full_cache_turns_later_tokens_away(
    saved_model: SavedModel, row: list[int], capacity: float, data: st.DataObject
) -> None:
    forced = np.array([data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for _ in ROUTED])
    contract = mod(cache={"capacity": capacity})
    model = ModReference.from_checkpoint(Routed(saved_model("llama")), contract=contract, max_length=MAX_LENGTH)
    _, [routes] = model.routed_logits([row], [[]], [forced])
    slots = contract.slots(MAX_LENGTH)
    for wanted, chosen, overflow in zip(forced, routes.chosen, routes.overflow, strict=True):
        assert chosen.sum() == min(wanted.sum(), slots)
        assert overflow == max(0, wanted.sum() - slots)
        np.testing.assert_array_equal(chosen, wanted & (np.cumsum(wanted) <= slots))


@pytest.mark.parametrize(("comparison", "expected"), [(">", False), (">=", True)])
def test_a_probability_equal_to_the_threshold(saved_model: SavedModel, comparison: str, expected: bool) -> None:
    checkpoint = with_scores(saved_model("llama"), 0.0)
    model = reference(checkpoint, decision={"comparison": comparison})
    _, routes = run_one(model, [5, 6, 7])
    assert (routes.chosen == expected).all()
    assert not routes.margin.any()


def test_thresholds_of_single_layers(saved_model: SavedModel) -> None:
    checkpoint = with_scores(saved_model("llama"), 1.0)  # sigmoid(1) = 0.731
    _, routes = run_one(reference(checkpoint, thresholds={1: 0.75}), [5, 6, 7])
    assert not routes.chosen[0].any() and routes.chosen[1].all()
    np.testing.assert_allclose(routes.margin, [[0.01894] * 3, [0.23106] * 3], atol=1e-5)


def test_routes_given_back_are_the_same_pass(saved_model: SavedModel) -> None:
    rows = random_rows(11, 19)
    model = reference(Routed(saved_model("llama")), prefill="topk", capacity=0.4)
    prompted = [[(0, 11)], [(0, 6), (9, 12)]]
    logits, routes = model.routed_logits(rows, prompted)
    again, _ = model.routed_logits(rows, [[], []], [row.chosen for row in routes])
    last, _ = model.routed_logits([rows[0]], [prompted[0]], at=(9, 10))
    for found, expected in zip([*again, *last], [*logits, logits[0][-2:]], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_streaming_equals_resident(saved_model: SavedModel) -> None:
    checkpoint, rows = Routed(saved_model("gemma2")), random_rows(9, 17)
    contract = mod(router_input="normed", decision={"rule": "predictor"})
    resident, streaming = (
        ModReference.from_checkpoint(checkpoint, streaming=streaming, contract=contract, max_length=MAX_LENGTH)
        for streaming in (False, True)
    )
    for expected, found in zip(resident.logits(rows), streaming.logits(rows), strict=True):
        np.testing.assert_array_equal(found, expected)


# What is refused.


@pytest.mark.parametrize("name", ["mod_router.weight", "mod_predictor.fc1.bias", "mod_predictor.fc2.weight"])
@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (None, "is not in the checkpoint, and the routing contract needs it"),
        (np.zeros((2, 3), np.float32), "expected shape"),
        ("nan", "expected finite numbers, found NaN or infinity"),
    ],
)
def test_bad_router_tensors(saved_model: SavedModel, name: str, tensor: Any, expected: str) -> None:
    full = f"model.layers.3.{name}"
    directory = saved_model("llama")
    if isinstance(tensor, str):
        tensor = np.full(Routed(directory).shape(full), np.nan, np.float32)
    with pytest.raises(DynexportError, match=expected) as error:
        reference(Routed(directory, **{full: tensor}), decision={"rule": "predictor"})
    assert "model.layers.3.mod_" in str(error.value) and "\n" not in str(error.value)


def test_a_routed_layer_that_the_model_does_not_have(saved_model: SavedModel) -> None:
    contract = mod(routed_layers=[1, 3, 4])
    with pytest.raises(DynexportError, match=r"routed_layers: expected layers in 0\.\.3, found 4"):
        ModReference.from_checkpoint(Routed(saved_model("llama")), contract=contract, max_length=MAX_LENGTH)


def test_scores_that_are_not_numbers(saved_model: SavedModel) -> None:
    checkpoint = Routed(saved_model("llama"))
    checkpoint.tensors["model.embed_tokens.weight"][5] = np.inf
    with pytest.raises(DynexportError, match="layer 1: expected router scores that are numbers, found NaN"):
        run_one(reference(checkpoint), [4, 5, 6])


@pytest.mark.parametrize(
    ("prompted", "forced", "expected"),
    [
        ([[(0, 3)]], [np.ones((2, 4), bool)], r"row 0: expected bool \[2, 3\], found bool \[2, 4\]"),
        ([[(0, 3)]], [np.ones((2, 3), int)], r"row 0: expected bool \[2, 3\], found int64 \[2, 3\]"),
        ([[(0, 3)]], [], "forced: expected an entry for each of 1 rows, found 0"),
        ([], None, "prompted: expected an entry for each of 1 rows, found 0"),
        ([[(0, 4)]], None, r"expected ascending ones within 0\.\.3, found \[\(0, 4\)\]"),
        ([[(1, 3), (0, 1)]], None, r"expected ascending ones within 0\.\.3"),
    ],
)
def test_bad_rows(saved_model: SavedModel, prompted: Any, forced: Any, expected: str) -> None:
    with pytest.raises(DynexportError, match=expected):
        reference(Routed(saved_model("llama"))).routed_logits([[4, 5, 6]], prompted, forced)


def test_routes_from_outside_go_to_routed_logits(saved_model: SavedModel) -> None:
    with pytest.raises(DynexportError, match="runs: expected none, as the routers decide"):
        reference(Routed(saved_model("llama"))).logits([[4, 5]], [np.ones((LAYERS, 2), bool)])


# Training.


def trainable(directory: Path, contract: Mod) -> Any:
    torch.manual_seed(3)
    # As the golden has it: the fast attention adds in another order, which a raw gate near 0 amplifies.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    add_routers(model, contract, bias=True, predictor_width=5)
    return model


class Trained(Routed):
    """What is saved after training."""

    def __init__(self, directory: Path, model: Any) -> None:
        super().__init__(directory)
        self.tensors = {name: tensor.detach().numpy() for name, tensor in contract_tensors(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
@quick
@given(form=FORMS, capacity=st.sampled_from([0.1, 0.4, 1.0]), tokens=st.integers(1, 14))
def test_training_runs_what_the_golden_runs(
    saved_model: SavedModel, family: str, form: dict[str, Any], capacity: float, tokens: int
) -> None:
    contract = mod(**form, capacity=capacity, prefill="topk", decision={"rule": "predictor"})
    model = trainable(saved_model(family), contract)
    rows = random_rows(tokens, tokens, tokens)
    with torch.no_grad(), top_k_routing(model, contract) as routes:
        logits = model(torch.tensor(rows), use_cache=False).logits.numpy()
    golden = ModReference.from_checkpoint(Trained(saved_model(family), model), contract=contract, max_length=MAX_LENGTH)
    expected, expected_routes = golden.routed_logits(rows, [[(0, tokens)]] * 3)
    assume(min(row.margin.min() for row in expected_routes) > 1e-5)
    np.testing.assert_allclose(logits, np.stack(expected), atol=1e-4)
    for place, layer in enumerate(ROUTED):
        chosen, score = (
            np.stack([getattr(row, part)[place] for row in expected_routes]) for part in ("chosen", "score")
        )
        np.testing.assert_array_equal(routes[layer].chosen.numpy(), chosen)
        np.testing.assert_allclose(routes[layer].score.numpy(), score, atol=1e-4)


@pytest.mark.parametrize("rule", ["router", "predictor"])
@pytest.mark.parametrize("gate", ["raw", "sigmoid"])
def test_gradients(saved_model: SavedModel, rule: str, gate: str) -> None:
    """The model's loss reaches routers through the gate; the auxiliary loss reaches what decides causally."""
    contract = mod(gate=gate, decision={"rule": rule}, capacity=0.5)
    model = trainable(saved_model("llama"), contract)
    ids = torch.tensor(random_rows(12, 12))

    def gradients(part: str) -> dict[str, Any]:
        model.zero_grad()
        with top_k_routing(model, contract) as routes:
            language = model(ids, use_cache=False, labels=ids).loss
        (language if part == "language" else auxiliary_loss(routes)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    routers = {f"model.layers.{layer}.mod_router.weight" for layer in ROUTED}
    predictors = {f"model.layers.{layer}.mod_predictor.{fc}.weight" for layer in ROUTED for fc in ("fc1", "fc2")}
    by_language = gradients("language").keys()
    assert routers <= by_language and not predictors & by_language
    by_auxiliary = gradients("auxiliary").keys()
    if rule == "predictor":
        assert predictors <= by_auxiliary and all(".mod_predictor." in name for name in by_auxiliary)
    else:
        assert routers <= by_auxiliary


def test_the_auxiliary_loss_is_cross_entropy_with_top_k(saved_model: SavedModel) -> None:
    contract = mod(capacity=0.25)
    model = trainable(saved_model("llama"), contract)
    with top_k_routing(model, contract) as routes:
        model(torch.tensor(random_rows(8, 8)), use_cache=False)
    terms = []
    for layer in routes.values():
        probability = 1 / (1 + np.exp(-layer.logit.detach().numpy().astype(np.float64)))
        terms.append(-np.log(np.where(layer.chosen.numpy(), probability, 1 - probability)).mean())
        assert (layer.chosen.sum(1) == 2).all()
    assert auxiliary_loss(routes).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_few_steps_teach_the_causal_rule(saved_model: SavedModel) -> None:
    contract = mod(capacity=0.25, router_input="normed")
    model = trainable(saved_model("llama"), contract)
    ids = torch.tensor(random_rows(24, 24, 24, 24))
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".mod_router." in name], lr=0.05)
    losses = []
    for _ in range(30):
        with top_k_routing(model, contract) as routes:
            model(ids, use_cache=False)
        loss = auxiliary_loss(routes)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]


def test_state_names_are_the_contract_s(saved_model: SavedModel) -> None:
    contract = mod(decision={"rule": "predictor"})
    for family in FAMILIES:
        names = {name for name in contract_tensors(trainable(saved_model(family), contract)) if "mod_" in name}
        assert names == {name for name in Routed(saved_model(family)).names if "mod_" in name}


def test_tied_tensors_are_saved_once(saved_model: SavedModel, tmp_path: Path) -> None:
    model = trainable(saved_model("qwen2"), mod())
    tensors = contract_tensors(model)
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
