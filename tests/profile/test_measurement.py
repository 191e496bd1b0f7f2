"""Contributions against what the layers' hidden states and submodules say by another way, for every family."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EXEMPLARS, FAMILIES, LAYERS, LOOPED, random_rows, save_model
from transformers import AutoModelForCausalLM

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families import families
from dynexport.exporter.profile import Measured, measure, measurement
from dynexport.exporter.profile.blocks import Blocks, Reader
from dynexport.exporter.reference import Reference
from dynexport.exporter.reference.layer_calls import Call
from dynexport.runtime.bundle.errors import DynexportError

WINDOW = 24
SavedModel = Callable[[str], Path]
# One of each family, and a layer of gpt_neox that is not parallel.
NAMES = [
    *EXEMPLARS,
    "codegen",
    "phi",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "nemotron-nas",
    "openelm",
    "gpt_neox-sequential",
]
# Without one matrix at the end of every MLP, or without an MLP in every layer.
NO_END = ("nemotron-nas", "openelm", "granitemoe", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss")
PARALLEL = ("codegen", "cohere", "falcon", "gpt_neox", "gptj", "phi")


def text(windows: int, seed: int = 3) -> list[int]:
    return random_rows(windows * WINDOW, seed=seed)[0]


def profiled(directory: Path, ids: list[int], **more: Any) -> Measured:
    return measure(open_checkpoint(directory), ids, window=WINDOW, **more)


def hidden_states(directory: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """transformers' own, with hooks around whole layers: [layers + 1] of float64 [rows * length, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    states: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(after)
    with torch.no_grad():
        model(torch.tensor(rows))
    return [state.double().flatten(0, 1) for state in states]


@pytest.mark.parametrize("name", NAMES)
def test_whole_layers_agree_with_hidden_states(saved_model: SavedModel, name: str) -> None:
    ids = text(3)
    measured = profiled(saved_model(name), ids, batch=2)
    states = hidden_states(saved_model(name), [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)])
    assert len(states) == LAYERS + 1
    for index, (x, y) in enumerate(itertools.pairwise(states)):
        added, before, after = (v.norm(dim=-1).numpy() for v in (y - x, x, y))
        np.testing.assert_allclose(measured.layer.of_input[index], added / before, rtol=2e-4)
        np.testing.assert_allclose(measured.layer.of_output[index], added / after, rtol=2e-4)
        cosine = (x * y).sum(-1).numpy() / (before * after)
        np.testing.assert_allclose(measured.influence[index], 1 - cosine, rtol=2e-4, atol=1e-9)
    assert measured.tokens.tolist() == ids


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_END])
def test_attention_is_what_is_left_when_the_mlp_adds_nothing(saved_model: SavedModel, name: str) -> None:
    measured = profiled(saved_model(name), text(1))
    if name in PARALLEL:
        assert list(measured.blocks) == ["attention + mlp"]
        np.testing.assert_array_equal(measured.blocks["attention + mlp"].of_input, measured.layer.of_input)
        return
    assert list(measured.blocks) == ["attention", "mlp"]
    states, between = silenced_mlp(saved_model(name), [text(1)])
    for index in range(LAYERS):
        x, y, z = states[index], states[index + 1], between[index]
        attention, mlp = (measured.blocks[block] for block in ("attention", "mlp"))
        norms = {what: v.norm(dim=-1).numpy() for what, v in {"x": x, "y": y, "z": z, "a": z - x, "m": y - z}.items()}
        np.testing.assert_allclose(attention.of_input[index], norms["a"] / norms["x"], rtol=5e-4)
        np.testing.assert_allclose(attention.of_output[index], norms["a"] / norms["z"], rtol=5e-4)
        np.testing.assert_allclose(mlp.of_input[index], norms["m"] / norms["z"], rtol=5e-4)
        np.testing.assert_allclose(mlp.of_output[index], norms["m"] / norms["y"], rtol=5e-4)


def silenced_mlp(directory: Path, rows: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states of the model, and x + A of every layer: its output over the same input, its MLP's last weights 0.

    Norms behind the MLP, as gemma2 has, come after its last weights.
    """
    reference = Reference.from_checkpoint(open_checkpoint(directory))
    states = hidden_states(directory, rows)
    model: Any = reference._model
    layers = reference._weights.layers
    ends = ("mlp.down_proj", "mlp.c_proj", "fc2", "mlp.dense_4h_to_h")
    ends += ("post_feedforward_layernorm", "post_mlp_layernorm")
    for layer in layers:
        end = next(layer.get_submodule(e) for e in reversed(ends) if e in dict(layer.named_modules()))
        original = end.forward
        end.forward = lambda *args, original=original: original(*args) * 0
    between: list[torch.Tensor] = []

    def give(index: int, layer: Any) -> Callable[..., Any]:
        def forward(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            x = states[index].float().view_as(hidden)
            result = type(layer).forward(layer, x, *args, **kwargs)
            between.append((result[0] if isinstance(result, tuple) else result).double().flatten(0, 1))
            return result

        return forward

    for index, layer in enumerate(layers):
        layer.forward = give(index, layer)
    with torch.no_grad():
        model(torch.tensor(rows), use_cache=False)
    return states, between


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt_neox"])
def test_batches_and_other_windows_do_not_matter(saved_model: SavedModel, name: str) -> None:
    ids = text(5)
    whole = profiled(saved_model(name), ids, batch=5)
    batched = profiled(saved_model(name), ids, batch=2)
    alone = profiled(saved_model(name), ids[3 * WINDOW : 4 * WINDOW])
    for pick in PICKS:
        np.testing.assert_allclose(pick(batched), pick(whole), rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(pick(alone), pick(whole)[:, 3 * WINDOW : 4 * WINDOW], rtol=1e-3, atol=1e-9)


PICKS: tuple[Callable[[Measured], np.ndarray], ...] = (
    lambda m: m.influence,
    lambda m: m.layer.of_input,
    lambda m: m.layer.of_output,
    lambda m: next(iter(m.blocks.values())).of_input,
)


def test_a_long_text_goes_through_in_several_passes(saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(5)
    whole = profiled(saved_model("llama"), ids, batch=2)
    monkeypatch.setattr(measurement, "_HELD_BYTES", 2 * WINDOW * 32 * 4)
    seen: list[tuple[int, int]] = []
    parts = profiled(saved_model("llama"), ids, batch=2, progress=lambda done, total: seen.append((done, total)))
    for pick in PICKS:
        np.testing.assert_allclose(pick(parts), pick(whole), rtol=1e-3)
    # Three passes of one group each, through four layers.
    assert seen == [(done, 12) for done in range(1, 13)]


def test_only_one_layer_is_in_memory(saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[set[int]] = []
    run = Reader.run
    runners: list[Any] = []

    def watched(self: Reader, index: int, layer: Any, *args: Any, **kwargs: Any) -> Any:
        (runner,) = runners
        layers = runner._weights.layers
        loaded.append({i for i, each in enumerate(layers) if not next(each.parameters()).is_meta})
        return run(self, index, layer, *args, **kwargs)

    make = measurement._Runner.__init__

    def noted(self: Any, *args: Any) -> None:
        make(self, *args)
        runners.append(self)

    monkeypatch.setattr(measurement._Runner, "__init__", noted)
    monkeypatch.setattr(Reader, "run", watched)
    profiled(saved_model("llama"), text(2), batch=1)
    assert loaded == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]


def test_the_text_is_cut_to_whole_windows(saved_model: SavedModel) -> None:
    ids = text(3)
    assert len(profiled(saved_model("llama"), ids[:-1]).tokens) == 2 * WINDOW
    assert len(profiled(saved_model("llama"), ids, max_tokens=WINDOW + 1).tokens) == WINDOW


def test_every_family_is_covered() -> None:
    assert {*FAMILIES, *LOOPED} == set(families())


@pytest.mark.parametrize("name", NAMES)
def test_what_blocks_add_is_what_layers_leave(
    saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, seen = Reader.run, []

    def watched(self: Reader, index: int, layer: Any, before: Any, *args: Any, **kwargs: Any) -> Any:
        after, attention, mlp = run(self, index, layer, before, *args, **kwargs)
        assert before.shape == after.shape == attention.shape == mlp.shape
        assert before.shape[:2] == (2, WINDOW)
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)
        assert (attention.norm() > 0 and mlp.norm() > 0) or name == "nemotron-nas"
        seen.append(index)
        return after, attention, mlp

    monkeypatch.setattr(Reader, "run", watched)
    profiled(saved_model(name), text(2))
    assert seen == list(range(LAYERS))


class Layer(torch.nn.Module):
    """x + A(x) + M(x + A(x)), with more than that on demand."""

    def __init__(self, more: float = 0.0, calls_mlp: bool = True) -> None:
        super().__init__()
        self.self_attn, self.mlp = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.more, self.calls_mlp = more, calls_mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.more + (self.mlp(x) if self.calls_mlp else torch.ones_like(x))


@pytest.mark.parametrize(
    ("blocks", "layer", "expected"),
    [
        (Blocks(), Layer(more=0.1), "layer 7: expected a layer that adds self_attn and mlp .* returns another sum"),
        (Blocks(), Layer(calls_mlp=False), "found that transformers' layer does not call its module mlp"),
        (Blocks("attn"), Layer(), "layer has no such module"),
        (Blocks(), Layer(more=float("nan")), "layer 7: expected finite hidden states"),
    ],
)
def test_a_layer_of_another_kind_is_refused(blocks: Blocks, layer: Layer, expected: str) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        Reader(Blocks(), "model").run(7, Layer(), x, Call((x,), {}))
        with pytest.raises(DynexportError, match=expected):
            Reader(blocks, "model").run(7, layer, x, Call((x,), {}))
    assert not layer.self_attn._forward_hooks and not layer.mlp._forward_hooks


def test_tokens_without_a_norm_are_finite() -> None:
    x, added = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]])
    for ratio in measurement._ratios(x, added, x + added):
        assert np.isfinite(ratio).all() and ratio[0] == 0
    assert measurement._influence(x, added, x + added).tolist() == [0, 1, 1]


def test_bloom_that_does_not_call_its_modules_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "m", "bloom", {**FAMILIES["bloom"], "pretraining_tp": 2, "slow_but_exact": True})
    with pytest.raises(DynexportError, match="slow_but_exact: expected False with a pretraining_tp of 2"):
        profiled(tmp_path / "m", text(1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"window": 65}, r"window: expected 1\.\.64 tokens, found 65"),
        ({"window": 0}, r"window: expected 1\.\.64 tokens, found 0"),
        ({"max_tokens": 23}, "max_tokens: expected at least one window of 24, found 23"),
        ({"batch": 0}, "batch: expected at least 1, found 0"),
        ({"ids": [1] * 23}, "text: expected at least one window of 24 tokens, found 23 tokens"),
        ({"ids": [1] * 23 + [97]}, r"text: expected token ids 0\.\.96, found 97"),
    ],
)
def test_bad_arguments(saved_model: SavedModel, arguments: dict[str, Any], expected: str) -> None:
    fields = {"ids": text(1), "window": WINDOW, **arguments}
    with pytest.raises(DynexportError, match=expected):
        measure(open_checkpoint(saved_model("llama")), **fields)


@pytest.mark.parametrize(
    ("declared", "accepted"),
    [
        ({"strategy": "dense"}, True),
        ({"strategy": "unified-skip", "speedups": [2]}, True),
        ({"strategy": "mod", "routed_layers": [1]}, False),
        ({"strategy": "radial"}, False),
        ("mod", False),
    ],
)
def test_only_dense_checkpoints(saved_model: SavedModel, declared: Any, accepted: bool) -> None:
    checkpoint = open_checkpoint(saved_model("llama"))
    checkpoint.config["dynexport"] = declared
    if accepted:
        assert len(measure(checkpoint, text(1), window=WINDOW).tokens) == WINDOW
    else:
        with pytest.raises(DynexportError, match=r"expected a dense checkpoint, found .* routers send there"):
            measure(checkpoint, text(1), window=WINDOW)
