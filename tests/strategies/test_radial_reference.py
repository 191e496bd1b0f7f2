"""The golden of radial networks: what the contract says of it, the conformance set, and training beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import EXEMPLARS, LAYERS, VOCABULARY, InMemory, random_rows

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Case, Reference, RowPaths
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.radial.oracle import RadialOracle
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from dynexport.exporter.strategies.radial.training import (  # noqa: E402
    add_router,
    contract_tensors,
    distillation_loss,
    expected_depth,
    order_loss,
    radial_routing,
)

torch.set_num_threads(1)  # more only get into the way of each other at these sizes

CONFORMANCE = sorted(path.parent for path in Path(__file__).parents[1].glob("conformance/radial-*/expected.json"))
# Rotary; learned positions; windows in every other layer; ALiBi; layers without positions.
SOME_FAMILIES = ("llama", "gpt2", "gemma2", "bloom", "smollm3")
STEPS = 5
WIDTH = 6
EXIT = LAYERS
SavedModel = Callable[[str], Path]
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Routed(InMemory):
    """A tiny model with random routers: a shared one, or one for each of ``STEPS`` steps."""

    def __init__(self, directory: Path, contract: Radial, seed: int = 7) -> None:
        super().__init__(directory)
        hidden = self.hidden
        choices = LAYERS + contract.exit
        generator = np.random.default_rng(seed)
        for step in [""] if contract.router.shared else [f"{step}." for step in range(contract.max_steps)]:
            for name, shape in {
                "norm.weight": (hidden,),
                "fc1.weight": (WIDTH, hidden),
                "fc1.bias": (WIDTH,),
                "fc2.weight": (choices, WIDTH),
                "fc2.bias": (choices,),
            }.items():
                tensor = generator.normal(0, 1, shape).astype(np.float32)
                self.tensors[f"model.radial_router.{step}{name}"] = tensor


def radial(**fields: Any) -> Radial:
    router = {"hidden": WIDTH, **fields.pop("router", {})}
    return Radial.model_validate({"max_steps": STEPS, **fields, "router": router})


def reference(directory: Path, seed: int = 7, **fields: Any) -> RadialReference:
    contract = radial(**fields)
    return RadialReference.from_checkpoint(Routed(directory, contract, seed), contract=contract)


def always(directory: Path, path: list[int], contract: Radial) -> RadialReference:
    """Whatever the hidden state, step s scores path[s] highest: routers of the steps with nothing but biases."""
    checkpoint = Routed(directory, contract)
    for step in range(contract.max_steps):
        prefix = f"model.radial_router.{step}."
        checkpoint.tensors[prefix + "fc2.weight"][:] = 0
        checkpoint.tensors[prefix + "fc2.bias"][:] = 0
        checkpoint.tensors[prefix + "fc2.bias"][path[step]] = 3
    return RadialReference.from_checkpoint(checkpoint, contract=contract)


def run_one(model: RadialReference, row: list[int], path: np.ndarray | None = None) -> tuple[np.ndarray, RowPaths]:
    [logits], [paths] = model.routed_logits([row], None if path is None else [path])
    return logits, paths


FORMS = st.fixed_dictionaries(
    {
        "min_steps": st.integers(0, STEPS),
        "exit": st.booleans(),
        "allow_reuse": st.booleans(),
        "router": st.fixed_dictionaries({"shared": st.booleans()}),
        "gate": st.sampled_from(["none", "probability"]),
        "cache_policy": st.sampled_from(["step", "layer"]),
    }
)
ROWS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=16)
SEEDS = st.integers(0, 99)
POLICIES = pytest.mark.parametrize("policy", ["step", "layer"])


# The conformance set.


@pytest.mark.parametrize("directory", CONFORMANCE, ids=lambda path: path.name)
@pytest.mark.parametrize("streaming", [False, True], ids=["resident", "streaming"])
def test_answers_of_an_independent_implementation(directory: Path, streaming: bool) -> None:
    checkpoint, expected = open_checkpoint(str(directory)), json.loads((directory / "expected.json").read_text())
    contract = Radial.model_validate(checkpoint.config["dynexport"])
    model = RadialReference.from_checkpoint(checkpoint, streaming=streaming, contract=contract)
    rows = [run["prompt"] + run["greedy"][:-1] for run in expected["runs"]]
    logits, paths = model.routed_logits(rows)
    for run, row_logits, row in zip(expected["runs"], logits, paths, strict=True):
        prompt = len(run["prompt"])
        assert np.abs(row_logits[prompt - 1] - run["last_prompt_logits"]).max() < 1e-4
        decided = np.array(run["logit_margins"]) >= 2e-3
        assert (row_logits[prompt - 1 :].argmax(-1) == run["greedy"])[decided].all()
        assert row.margin.min() >= 1e-5  # so that every choice counts
        assert row.margin.min() == pytest.approx(run["smallest_route_margin"], abs=1e-4)
        for token, route in enumerate(run["routes"]):
            assert [choice for choice in row.path[:, token] if choice >= 0] == route
            assert row.depth[token] == sum(choice < 4 for choice in route)


@pytest.mark.parametrize("family", EXEMPLARS)
@POLICIES
def test_the_next_layer_at_every_step_is_the_sequential_model(
    saved_model: SavedModel, family: str, policy: str
) -> None:
    contract = radial(max_steps=LAYERS, router={"shared": False}, exit=False, cache_policy=policy)
    model, rows = always(saved_model(family), list(range(LAYERS)), contract), random_rows(13, 1, 7)
    logits, paths = model.routed_logits(rows)
    outputs, _ = model.routed_step_outputs(rows)
    plain = Reference.from_checkpoint(Routed(saved_model(family), contract))
    for found, expected in zip(logits, plain.logits(rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-6)
    for found, expected in zip(outputs, plain.layer_outputs(rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-6)
    for row in paths:
        assert (row.path == np.arange(LAYERS)[:, None]).all() and (row.depth == LAYERS).all()


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_exit_at_step_0_leaves_the_embedding(saved_model: SavedModel, family: str) -> None:
    contract = radial(router={"shared": False})
    model, rows = always(saved_model(family), [EXIT] * STEPS, contract), random_rows(5, 9)
    logits, paths = model.routed_logits(rows)
    nowhere = [np.zeros((LAYERS, len(row)), bool) for row in rows]
    plain = Reference.from_checkpoint(Routed(saved_model(family), contract)).logits(rows, nowhere)
    for found, expected, row in zip(logits, plain, paths, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (row.path[0] == EXIT).all() and (row.path[1:] == -1).all() and not row.depth.any()
        assert (row.score[0] == 3).all() and (row.margin[0] == 3).all() and np.isinf(row.margin[1:]).all()
        np.testing.assert_allclose(row.probability[0], np.exp(3) / (np.exp(3) + LAYERS), rtol=1e-5)


@quick
@given(row=ROWS, form=FORMS, seed=SEEDS)
def test_paths_are_what_the_contract_allows(
    saved_model: SavedModel, row: list[int], form: dict[str, Any], seed: int
) -> None:
    model, contract = reference(saved_model("llama"), seed, **form), radial(**form)
    _, paths = run_one(model, row)
    for path in paths.path.T:
        chosen = [choice for choice in path if choice != -1]
        assert (path[len(chosen) :] == -1).all() and chosen and EXIT not in chosen[:-1]
        layers = [choice for choice in chosen if choice != EXIT]
        assert contract.allow_reuse or len(set(layers)) == len(layers)
        if EXIT in chosen:
            assert contract.exit and len(layers) >= contract.min_steps
        else:
            assert len(layers) == (STEPS if contract.allow_reuse else LAYERS)
    np.testing.assert_array_equal(paths.depth, ((paths.path >= 0) & (paths.path < LAYERS)).sum(0))
    assert (paths.margin >= 0).all()
    asked = paths.path != -1
    assert ((paths.probability > 0) == asked).all() and not paths.score[~asked].any()


@quick
@given(row=ROWS.filter(lambda row: len(row) > 1), form=FORMS, seed=SEEDS, data=st.data())
def test_what_follows_changes_nothing(
    saved_model: SavedModel, row: list[int], form: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    """So a prefill gives what single steps give."""
    model = reference(saved_model(data.draw(st.sampled_from(SOME_FAMILIES))), seed, **form)
    logits, paths = run_one(model, row)
    length = data.draw(st.integers(1, len(row) - 1))
    before, paths_before = run_one(model, row[:length])
    assume(paths.margin.min() > 1e-5)  # rounding decides nearer ones
    np.testing.assert_array_equal(paths_before.path, paths.path[:, :length])
    np.testing.assert_allclose(before, logits[:length], atol=5e-5)
    np.testing.assert_array_equal(before, model.logits([row[:length]])[0])


@quick
@given(row=ROWS, policy=st.sampled_from(["step", "layer"]), gate=st.sampled_from(["none", "probability"]), seed=SEEDS)
def test_entry_by_entry(saved_model: SavedModel, row: list[int], policy: str, gate: str, seed: int) -> None:
    """Token after token, each through all its steps before the next, with entries picked by the contract's words."""
    model = reference(saved_model("llama"), seed, cache_policy=policy, gate=gate)
    logits, paths = run_one(model, row)
    np.testing.assert_allclose(logits, single_steps(model, row, paths, policy, gate), atol=5e-5)


def single_steps(model: RadialReference, row: list[int], paths: RowPaths, policy: str, gate: str) -> np.ndarray:
    llama, logits = model._model, []
    made: list[tuple[int, int, int, Any, Any]] = []  # position, step, layer, keys, values

    class Cache:
        def __init__(self, position: int, step: int) -> None:
            self.position, self.step = position, step

        def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            made.append((self.position, self.step, layer, keys, values))
            shown = [entry for entry in made if self.shows(*entry[:3], layer)]
            return torch.cat([entry[3] for entry in shown], 2), torch.cat([entry[4] for entry in shown], 2)

        def shows(self, position: int, step: int, layer: int, own_layer: int) -> bool:
            if policy == "step":
                return step == self.step
            return layer == own_layer and (position == self.position or step <= self.step)

    with torch.no_grad():
        for position, token in enumerate(row):
            h = llama.model.embed_tokens(torch.tensor([[token]]))
            rotary = llama.model.rotary_emb(h, torch.tensor([[position]]))
            for step, choice in enumerate(paths.path[:, position]):
                if 0 <= choice < LAYERS:
                    cache = Cache(position, step)
                    # By position, as versions differ in its name: mask, position ids, cache.
                    y = llama.model.layers[choice](h, None, None, cache, position_embeddings=rotary)
                    h = y if gate == "none" else h + float(paths.probability[step, position]) * (y - h)
            logits.append(llama.lm_head(llama.model.norm(h))[0, 0].numpy())
    return np.array(logits)


@pytest.mark.parametrize("gate", ["none", "probability"])
@POLICIES
def test_paths_given_back_are_the_same_pass(saved_model: SavedModel, policy: str, gate: str) -> None:
    rows = random_rows(11, 19)
    model = reference(saved_model("llama"), cache_policy=policy, gate=gate)
    logits, paths = model.routed_logits(rows)
    assert len({tuple(path) for row in paths for path in row.path.T}) > 3
    again, paths_again = model.routed_logits(rows, [row.path for row in paths])
    [last], _ = model.routed_logits(rows[:1], at=(9, 10))
    outputs, _ = model.routed_step_outputs(rows)
    assert [output.shape for output in outputs] == [(STEPS, 11, 32), (STEPS, 19, 32)]
    for found, expected in zip([*again, last], [*logits, logits[0][-2:]], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for found, expected in zip(paths_again, paths, strict=True):
        np.testing.assert_array_equal(found.probability, expected.probability)


def test_a_forced_choice_has_its_own_score_and_probability(saved_model: SavedModel) -> None:
    model = reference(saved_model("llama"), max_steps=1, gate="probability")
    own = run_one(model, [5])[1]
    every = [run_one(model, [5], np.array([[choice]]))[1] for choice in range(LAYERS + 1)]
    assert sum(paths.probability[0, 0] for paths in every) == pytest.approx(1, abs=1e-6)
    assert max(paths.score[0, 0] for paths in every) == own.score[0, 0]
    assert {paths.margin[0, 0] for paths in every} == {own.margin[0, 0]}
    assert [paths.depth[0] for paths in every] == [1] * LAYERS + [0]


def test_when_nothing_is_left_the_token_leaves(saved_model: SavedModel) -> None:
    """Also where exit would not be allowed yet."""
    fields = {"max_steps": LAYERS + 2, "allow_reuse": False}
    for more in ({"exit": False}, {"min_steps": LAYERS + 2}):
        _, paths = run_one(reference(saved_model("llama"), **fields, **more), [5, 6, 7])
        assert (np.sort(paths.path[:LAYERS], axis=0) == np.arange(LAYERS)[:, None]).all()
        assert (paths.path[LAYERS:] == -1).all()
        assert np.isinf(paths.margin[LAYERS - 1 :]).all() and (paths.probability[LAYERS - 1] == 1).all()


def test_of_equal_scores_the_lowest_index_wins(saved_model: SavedModel) -> None:
    contract = radial(router={"shared": False}, allow_reuse=False)
    checkpoint = Routed(saved_model("llama"), contract)
    for name in checkpoint.tensors:
        if "radial_router" in name and "fc2" in name:
            checkpoint.tensors[name][:] = 0
    _, paths = run_one(RadialReference.from_checkpoint(checkpoint, contract=contract), [5, 6])
    np.testing.assert_array_equal(paths.path, np.arange(STEPS)[:, None].repeat(2, 1))
    assert not paths.margin[:LAYERS].any() and np.isinf(paths.margin[LAYERS]).all()


@POLICIES
def test_streaming_equals_resident(saved_model: SavedModel, policy: str) -> None:
    contract, rows = radial(cache_policy=policy, router={"shared": False}), random_rows(9, 17)
    checkpoint = Routed(saved_model("gemma2"), contract)
    resident, streaming = (
        RadialReference.from_checkpoint(checkpoint, streaming=streaming, contract=contract)
        for streaming in (False, True)
    )
    for expected, found in zip(resident.logits(rows), streaming.logits(rows), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_oracle_tells_of_paths_and_steps(saved_model: SavedModel) -> None:
    contract, rows = radial(), random_rows(6, 9)
    checkpoint = Routed(saved_model("llama"), contract)
    oracle = RadialOracle(Weights(checkpoint, streaming=False), contract)
    cases = [
        Case(tuple(row), ((0, 3),), Depth(name="1", ratio=1.0, keep=tuple(range(LAYERS)), prompt=tuple(range(LAYERS))))
        for row in rows
    ]
    logits, paths = reference(saved_model("llama")).routed_logits(rows)
    for answer, values, row in zip(oracle.answers(cases), logits, paths, strict=True):
        assert isinstance(answer.routes, RowPaths)
        np.testing.assert_array_equal(answer.logits, values)
        np.testing.assert_array_equal(answer.routes.path, row.path)
    for hidden, row in zip(oracle.hidden_states(cases), rows, strict=True):
        assert hidden.shape == (1 + STEPS, len(row), 32)
        np.testing.assert_array_equal(hidden[0], checkpoint.tensors["model.embed_tokens.weight"][row])


# What is refused.


@pytest.mark.parametrize("name", ["norm.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, "is not in the checkpoint, and the routing contract needs it"),
        ((2, 3), "expected"),
        ("nan", "expected finite numbers, found NaN or infinity"),
    ],
)
def test_bad_router_tensors(saved_model: SavedModel, name: str, shape: Any, expected: str) -> None:
    contract, full = radial(router={"shared": False}), f"model.radial_router.3.{name}"
    checkpoint = Routed(saved_model("llama"), contract)
    tensor = checkpoint.tensors.pop(full)
    if shape is not None:
        checkpoint.tensors[full] = np.full_like(tensor, np.nan) if shape == "nan" else np.zeros(shape, np.float32)
    with pytest.raises(DynexportError, match=expected) as error:
        RadialReference.from_checkpoint(checkpoint, contract=contract)
    assert full in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        (True, False, "expected 4 scores, for 4 layers and no exit, found shape"),
        (False, True, "expected 5 scores, for 4 layers and exit, found shape"),
    ],
)
def test_exit_that_the_router_does_not_have(saved_model: SavedModel, written: bool, read: bool, expected: str) -> None:
    checkpoint = Routed(saved_model("llama"), radial(exit=written))
    with pytest.raises(DynexportError, match=expected):
        RadialReference.from_checkpoint(checkpoint, contract=radial(exit=read))


def test_layers_that_are_not_alike(saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference(saved_model("llama"))
    model._weights.layers[2].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(DynexportError, match=r"layer 2: mlp.up_proj.weight: expected shape \(44, 32\) as in layer 0"):
        RadialReference(model._weights, radial())


def test_scores_that_are_not_numbers(saved_model: SavedModel) -> None:
    contract = radial()
    checkpoint = Routed(saved_model("llama"), contract)
    checkpoint.tensors["model.embed_tokens.weight"][5] = np.inf
    with pytest.raises(DynexportError, match="step 0: row 0, token 1: expected finite router scores, found NaN"):
        run_one(RadialReference.from_checkpoint(checkpoint, contract=contract), [4, 5, 6])


def path_of(*choices: int) -> np.ndarray:
    """A token's path, as long as the steps."""
    return np.array([choices + (-1,) * (STEPS - len(choices))]).T


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        ([], "forced: expected an entry for each of 1 rows, found 0"),
        ([path_of(0).repeat(2, 1)], r"path of row 0: expected int64 \[5, 1\], found int64 \[5, 2\]"),
        ([path_of(0).astype(np.int32)], r"path of row 0: expected int64 \[5, 1\], found int32 \[5, 1\]"),
        ([path_of(5)], r"row 0, step 0, token 0: expected one of \[0, 1, 2, 3\], found 5"),
        ([path_of(EXIT)], r"row 0, step 0, token 0: expected one of \[0, 1, 2, 3\], found 4"),
        ([path_of(2, 2)], r"row 0, step 1, token 0: expected one of \[0, 1, 3, 4\], found 2"),
        ([path_of(2)], r"row 0, step 1, token 0: expected one of \[0, 1, 3, 4\], found -1"),
        ([path_of(2, EXIT, 1)], r"row 0, step 2, token 0: expected one of \[-1\], found 1"),
        ([path_of(-2)], r"row 0, step 0, token 0: expected one of \[0, 1, 2, 3\], found -2"),
    ],
)
def test_bad_forced_paths(saved_model: SavedModel, forced: Any, expected: str) -> None:
    model = reference(saved_model("llama"), min_steps=1, allow_reuse=False)
    with pytest.raises(DynexportError, match=expected):
        model.routed_logits([[4]], forced)


def test_what_a_fixed_order_of_layers_would_have(saved_model: SavedModel) -> None:
    model = reference(saved_model("llama"))
    with pytest.raises(DynexportError, match="runs: expected none, as the router decides"):
        model.logits([[4, 5]], [np.ones((LAYERS, 2), bool)])
    with pytest.raises(DynexportError, match="use routed_step_outputs"):
        model.layer_outputs([[4, 5]])


# Training.


def trainable(directory: Path, contract: Radial, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    # The fast attention of older versions leaves out gemma2's soft cap.
    attention = "eager" if transformers.AutoConfig.from_pretrained(directory).model_type == "gemma2" else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    add_router(model, contract)
    for name, parameter in model.named_parameters():
        if ".radial_router." in name:  # so that choices vary
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model


class Trained(Routed):
    """What is saved after training."""

    def __init__(self, directory: Path, model: Any) -> None:
        super().__init__(directory, radial())
        self.tensors = {name: tensor.detach().numpy() for name, tensor in contract_tensors(model).items()}


@pytest.mark.parametrize("family", SOME_FAMILIES)
@settings(quick, max_examples=4)
@given(form=FORMS, tokens=st.integers(1, 14), seed=SEEDS)
def test_training_runs_what_the_golden_runs(
    saved_model: SavedModel, family: str, form: dict[str, Any], tokens: int, seed: int
) -> None:
    contract = radial(**form | {"cache_policy": "step"})
    model = trainable(saved_model(family), contract, seed)
    rows = random_rows(tokens, tokens, tokens)
    with torch.no_grad(), radial_routing(model, contract) as steps:
        logits = model(torch.tensor(rows), use_cache=False).logits.numpy()
    golden = RadialReference.from_checkpoint(Trained(saved_model(family), model), contract=contract)
    expected, paths = golden.routed_logits(rows)
    assume(min(row.margin.min() for row in paths) > 1e-5)
    np.testing.assert_array_equal(np.stack([step.choice.numpy() for step in steps], 1), [row.path for row in paths])
    np.testing.assert_allclose(logits, np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("gate", ["none", "probability"])
def test_gradients(saved_model: SavedModel, gate: str) -> None:
    """The model's loss reaches the router and every layer that ran; the price of depth reaches the router alone."""
    contract = radial(gate=gate, router={"shared": False})
    model = trainable(saved_model("llama"), contract)
    ids = torch.tensor(random_rows(12, 12))

    def gradients(part: str) -> set[str]:
        model.zero_grad()
        with radial_routing(model, contract, temperature=1.0) as steps:
            language = model(ids, use_cache=False, labels=ids).loss
        (language if part == "language" else expected_depth(steps)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    routers = {f"model.radial_router.{step}.fc2.weight" for step in range(2)}
    by_language = gradients("language")
    assert routers <= by_language and any("self_attn.k_proj" in name for name in by_language)
    assert routers <= gradients("depth")


def test_straight_through_has_the_gradient_of_the_gate(saved_model: SavedModel) -> None:
    """With one step, of one loss that is linear in the hidden states, both are the same to the router."""
    grads = []
    for gate in ("none", "probability"):
        contract = radial(gate=gate, max_steps=1)
        model = trainable(saved_model("llama"), contract)
        model.model.norm = torch.nn.Identity()
        with radial_routing(model, contract):
            model(torch.tensor(random_rows(7)), use_cache=False).logits.sum().backward()
        grads.append(model.model.radial_router.fc1.weight.grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_drawn_choices_follow_the_probabilities(saved_model: SavedModel) -> None:
    contract, tokens = radial(max_steps=1), random_rows(*[40] * 12)
    model = trainable(saved_model("llama"), contract)
    model.model.radial_router.fc2.weight.data[:] = 0
    bias = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])
    model.model.radial_router.fc2.bias.data[:] = bias
    for temperature in (0.5, 2.0):
        with torch.no_grad(), radial_routing(model, contract, temperature=temperature) as steps:
            model(torch.tensor(tokens), use_cache=False)
        shares = steps[0].choice.flatten().bincount(minlength=LAYERS + 1) / 480
        torch.testing.assert_close(shares, torch.softmax(bias / temperature, 0), rtol=0, atol=0.07)


def test_expected_depth_of_a_router_that_never_changes_its_mind(saved_model: SavedModel) -> None:
    contract = radial(max_steps=3, min_steps=1)
    model = trainable(saved_model("llama"), contract)
    model.model.radial_router.fc2.weight.data[:] = 0
    model.model.radial_router.fc2.bias.data[:] = 0  # five equal scores
    with radial_routing(model, contract) as steps:
        model(torch.tensor(random_rows(6)), use_cache=False)
    assert expected_depth(steps).item() == pytest.approx(1 + 0.8 + 0.8 * 0.8)
    with radial_routing(model, contract, forced=torch.tensor([0, EXIT, -1])[:, None, None].expand(3, 1, 6)) as steps:
        model(torch.tensor(random_rows(6)), use_cache=False)
    assert expected_depth(steps).item() == pytest.approx(1 + 0.8)


def test_the_distance_from_the_teacher() -> None:
    logits, teacher = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2.0, 0.0]]])
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(logits / 2, -1)
    divergence = 4 * (p * (p / q).log()).sum()
    hidden, wanted = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    found = distillation_loss(logits, teacher, hidden, wanted, temperature=2.0, weight=0.5)
    assert found.item() == pytest.approx(divergence.item() + 0.5 * 5 / 4, rel=1e-5)
    assert distillation_loss(teacher, teacher, wanted, wanted).item() == pytest.approx(0, abs=1e-6)


def test_the_teacher_s_order_is_learnt(saved_model: SavedModel) -> None:
    contract = radial(max_steps=LAYERS + 1, router={"hidden": 32})
    model, ids = trainable(saved_model("llama"), contract), torch.tensor(random_rows(16, 16))
    order = torch.arange(LAYERS + 1)
    optimizer = torch.optim.Adam(model.model.radial_router.parameters(), lr=0.05)
    for _ in range(45):
        with radial_routing(model, contract, forced=order[:, None, None].expand(-1, *ids.shape)) as steps:
            model(ids, use_cache=False)
        optimizer.zero_grad()
        order_loss(steps, order).backward()
        optimizer.step()
    with torch.no_grad(), radial_routing(model, contract) as steps:
        student = model(ids, use_cache=False).logits
    ordered = torch.stack([step.choice for step in steps], -1).eq(order).all(-1)
    assert ordered.float().mean() > 0.9
    # Up to the first token that took another path, the student is its teacher.
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved_model("llama"), dtype=torch.float32)
    same = ordered.byte().cumprod(1).bool()
    torch.testing.assert_close(student[same], plain(ids, use_cache=False).logits[same], rtol=0, atol=1e-4)


def test_distillation_brings_a_student_nearer(saved_model: SavedModel) -> None:
    contract = radial()
    model, ids = trainable(saved_model("llama"), contract), torch.tensor(random_rows(16, 16))
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        teacher = plain(ids, use_cache=False, output_hidden_states=True)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(25):
        with radial_routing(model, contract) as steps:
            student = model(ids, use_cache=False, output_hidden_states=True)
        hidden, wanted = student.hidden_states[-1], teacher.hidden_states[-1]
        loss = distillation_loss(student.logits, teacher.logits, hidden, wanted) + 0.01 * expected_depth(steps)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_what_training_refuses(saved_model: SavedModel) -> None:
    contract = radial(min_steps=1)
    model, ids = trainable(saved_model("llama"), contract), torch.tensor(random_rows(4))
    with (
        pytest.raises(DynexportError, match="expected cache_policy step, found layer"),
        radial_routing(model, radial(cache_policy="layer")),
    ):
        pass
    model.gradient_checkpointing_enable()
    with pytest.raises(DynexportError, match="without gradient checkpointing"), radial_routing(model, contract):
        pass
    model.gradient_checkpointing_disable()
    forced = torch.full((STEPS, 1, 4), EXIT)
    with (
        pytest.raises(DynexportError, match="step 0: expected forced choices that are allowed"),
        radial_routing(model, contract, forced=forced),
    ):
        model(ids, use_cache=False)


@pytest.mark.parametrize("shared", [True, False])
def test_state_names_are_the_contract_s(saved_model: SavedModel, shared: bool) -> None:
    contract = radial(router={"shared": shared})
    for family in SOME_FAMILIES:
        tensors = contract_tensors(trainable(saved_model(family), contract))
        expected = Routed(saved_model(family), contract)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "radial" in name}
        assert found == {name: expected.shape(name) for name in expected.names if "radial" in name}
