"""The PyTorch golden against ordinary transformers models, other ways to skip, and the conformance set."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import EXEMPLARS, FAMILIES, LAYERS, VOCABULARY, random_rows, save_model

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime.bundle.errors import DynexportError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFORMANCE = Path(__file__).parents[1] / "conformance"

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# The golden runs whatever transformers runs, also where the exporter refuses.
CONFIGS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "llama": {**FAMILIES["llama"], "rope_parameters": YARN},
    "gpt2": {**FAMILIES["gpt2"], "scale_attn_by_inverse_layer_idx": True},
}


class Directory(Checkpoint):
    """A config.json and one safetensors file, read in the plainest way."""

    def __init__(self, directory: Path) -> None:
        self.source = str(directory)
        self.config = json.loads((directory / "config.json").read_text())
        self.files = {}
        self._tensors = load_file(directory / "model.safetensors")

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].astype(np.float32)


# Those whose layers, caches or weights the reference treats in a way of its own.
SPECIAL = (*EXEMPLARS, "gemma3_text", "gpt_oss", "granitemoe", "nemotron-nas", "openelm", "qwen3_moe")


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        torch.set_num_threads(2)
        directory = tmp_path_factory.mktemp(family)
        save_model(directory, family, CONFIGS[family])
        return directory

    return make


@pytest.fixture(scope="module", params=SPECIAL)
def family_directory(request: pytest.FixtureRequest, directory_of: Callable[[str], Path]) -> Path:
    return directory_of(request.param)


def is_of(directory: Path, *families: str) -> bool:
    return json.loads((directory / "config.json").read_text())["model_type"] in families


def ordinary_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def decoder_layers(model: Any) -> list[Any]:
    return next(list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)


def ordinary_logits(model: Any, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([row]), use_cache=False).logits[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_dense_equals_transformers(family: str, directory_of: Callable[[str], Path]) -> None:
    model = ordinary_model(directory_of(family))
    rows = random_rows(13, 1, 22)
    reference = Reference.from_checkpoint(Directory(directory_of(family)))
    for row, logits in zip(rows, reference.logits(rows), strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, ordinary_logits(model, row), atol=1e-5, rtol=1e-5)


def test_streaming_equals_resident_and_frees_its_layers(family_directory: Path) -> None:
    rows = random_rows(9, 17)
    runs = [unified_skip_runs(4, len(row), {0, 3}, LAYERS) for row in rows]
    resident = Reference.from_checkpoint(Directory(family_directory))
    streaming = Reference.from_checkpoint(Directory(family_directory), streaming=True)
    for _ in range(2):
        for expected, found in zip(resident.logits(rows, runs), streaming.logits(rows, runs), strict=True):
            np.testing.assert_array_equal(found, expected)
        layers = decoder_layers(streaming._model)
        assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_unified_skip_equals_decoding_with_a_cache(family_directory: Path) -> None:
    """Token by token with transformers' own cache, skipped layers replaced by the identity.

    Layers 0 and 1 are kept: transformers takes the length of what is cached from the first layer of a kind.
    """
    if is_of(family_directory, "openelm", "nemotron-nas"):
        return  # the reference's own class decodes without a cache; transformers' counts entries of the absent layer 0
    prompt, generated = random_rows(7, 9)
    model = ordinary_model(family_directory)
    skipped, outputs = decoder_layers(model)[2], []
    hook = skipped.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        first = model(torch.tensor([prompt]), use_cache=True)
        hook.remove()
        # A version may have another name for it, in what it returns and in what it takes.
        cache = {name: value for name, value in first.items() if isinstance(value, transformers.Cache)}
        expected = [first.logits[0]]
        tuples = isinstance(outputs[0], tuple)
        skipped.forward = lambda hidden_states, *_, **__: (hidden_states, None) if tuples else hidden_states
        for token in generated:
            expected.append(model(torch.tensor([[token]]), **cache).logits[0])
    row = prompt + generated
    runs = unified_skip_runs(len(prompt), len(row), {0, 1, 3}, LAYERS)
    [found] = Reference.from_checkpoint(Directory(family_directory)).logits([row], [runs])
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), atol=1e-5, rtol=1e-5)


def test_any_route_equals_masking(family_directory: Path) -> None:
    """Layers see all tokens; the keys of those that do not run are masked, their results thrown away."""
    row = random_rows(15)[0]
    runs = np.random.default_rng(5).random((LAYERS, len(row))) < 0.6
    model = ordinary_model(family_directory)
    with mask_instead(model, runs):
        expected = ordinary_logits(model, row)
    [found] = Reference.from_checkpoint(Directory(family_directory)).logits([row], [runs])
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@contextmanager
def mask_instead(model: Any, runs: np.ndarray) -> Iterator[None]:
    handles = []
    for layer, layer_runs in zip(decoder_layers(model), torch.from_numpy(runs), strict=True):

        def mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], runs: Any = layer_runs) -> Any:
            def masked(value: Any) -> Any:
                is_mask = isinstance(value, torch.Tensor) and value.ndim == 4
                return value.masked_fill(~runs, torch.finfo(value.dtype).min) if is_mask else value

            return tuple(map(masked, args)), {name: masked(value) for name, value in kwargs.items()}

        def restore(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, runs: Any = layer_runs
        ) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            after = torch.where(runs[None, :, None], after, args[0])
            return (after, None) if isinstance(output, tuple) else after

        handles.append(layer.register_forward_pre_hook(mask, with_kwargs=True))
        handles.append(layer.register_forward_hook(restore, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


def test_a_token_that_runs_nowhere_keeps_its_embedding(family_directory: Path) -> None:
    if is_of(family_directory, "openelm"):
        return  # the reference's own class gives no hidden states
    row = random_rows(8)[0]
    runs = np.ones((LAYERS, len(row)), dtype=bool)
    runs[:, 5] = False
    reference = Reference.from_checkpoint(Directory(family_directory))
    [outputs] = reference.layer_outputs([row], [runs])
    model = ordinary_model(family_directory)
    with torch.no_grad():
        states = model(torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states
    assert outputs.shape == (LAYERS, len(row), 32)
    np.testing.assert_array_equal(outputs[:, 5], np.repeat(states[0][0, 5:6].numpy(), LAYERS, axis=0))
    np.testing.assert_allclose(outputs[0, :5], states[1][0, :5], atol=1e-5, rtol=1e-5)
    [other] = reference.layer_outputs([[*row[:5], (row[5] + 1) % VOCABULARY, *row[6:]]], [runs])
    np.testing.assert_array_equal(np.delete(other, 5, axis=1), np.delete(outputs, 5, axis=1))


def test_no_token_runs_in_a_layer(family_directory: Path) -> None:
    row = random_rows(6)[0]
    runs = unified_skip_runs(0, len(row), (), LAYERS)
    [outputs] = Reference.from_checkpoint(Directory(family_directory), streaming=True).layer_outputs([row], [runs])
    np.testing.assert_array_equal(outputs, np.repeat(outputs[:1], LAYERS, axis=0))


@pytest.mark.parametrize("case", ["dense", "dense-tied-mqa", "skip-2x", "skip-3x", "skip-keep"])
def test_conformance(case: str) -> None:
    checkpoint = Directory(CONFORMANCE / case)
    expected = json.loads((CONFORMANCE / case / "expected.json").read_text())
    prompts = [run["prompt"] for run in expected["runs"]]
    reference = Reference.from_checkpoint(checkpoint)

    def runs_for(row: int, length: int) -> np.ndarray:
        keep = range(reference.layers) if expected["keep"] is None else expected["keep"]
        return unified_skip_runs(len(prompts[row]), length, keep, reference.layers)

    tokens, logits = reference.greedy(prompts, len(expected["runs"][0]["greedy"]), runs_for)
    for row, run in enumerate(expected["runs"]):
        np.testing.assert_allclose(logits[row, 0], run["last_prompt_logits"], atol=1e-4)
        for found, wanted, margin in zip(tokens[row], run["greedy"], run["logit_margins"], strict=True):
            if margin < 2e-3:
                break  # after another choice at a near-tie the sequences have nothing to do with each other
            assert found == wanted


def test_later_prompt_segments_run_everywhere() -> None:
    runs = unified_skip_runs(2, 7, {0, 2}, 3, segments=[(4, 6)])
    assert runs[0].all() and runs[2].all()
    assert runs[1].tolist() == [True, True, False, False, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": {0, 3}}, r"kept layers in 0..2, found \[3\]"),
        ({"segments": [(5, 8)]}, r"prompt segments within 0..7, found \(5, 8\)"),
    ],
)
def test_unified_skip_refuses_what_is_outside(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DynexportError, match=message):
        unified_skip_runs(2, 7, arguments.pop("keep", {0}), 3, **arguments)


@pytest.mark.parametrize(
    ("tokens", "runs", "message"),
    [
        ([], None, "at least one row"),
        ([[1], []], None, "row 1: expected 1 to 256 tokens, found 0"),
        ([[1] * 257], None, "row 0: expected 1 to 256 tokens, found 257"),
        ([[1, 89]], None, "row 0: expected token ids in 0..88, found 89"),
        ([[1, -1]], None, "found -1"),
        ([[1, 2]], [], "runs: expected an array for each of 1 rows, found 0"),
        (
            [[1, 2]],
            [np.ones((4, 3), dtype=bool)],
            r"runs of row 0: expected bool \[4, 2\], found bool \[4, 3\]",
        ),
        ([[1, 2]], [np.ones((4, 2))], r"found float64 \[4, 2\]"),
    ],
)
def test_bad_rows_and_runs_are_refused(tokens: list[list[int]], runs: Any, message: str) -> None:
    reference = Reference.from_checkpoint(Directory(CONFORMANCE / "dense"))
    with pytest.raises(DynexportError, match=message):
        reference.logits(tokens, runs)


def test_no_steps_are_refused() -> None:
    reference = Reference.from_checkpoint(Directory(CONFORMANCE / "dense"))
    with pytest.raises(DynexportError, match="at least 1 step, found 0"):
        reference.greedy([[1]], 0)


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_missing_module_is_told_in_one_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DynexportError, match=rf"{module} is needed .*: pip install 'dynexport\[torch\]'"):
        Reference.from_checkpoint(Directory(CONFORMANCE / "dense"))


def changed(tmp_path: Path, tensors: dict[str, np.ndarray | None], **fields: Any) -> Directory:
    """The conformance set's dense checkpoint with other tensors (None: without) and config fields."""
    config = json.loads((CONFORMANCE / "dense" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    merged = load_file(CONFORMANCE / "dense" / "model.safetensors") | tensors
    present = {name: tensor for name, tensor in merged.items() if tensor is not None}
    save_file(present, tmp_path / "model.safetensors")
    return Directory(tmp_path)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=r"tensor lm_head\.weight is not in the checkpoint"):
        Reference.from_checkpoint(changed(tmp_path, {"lm_head.weight": None}))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path, {"model.norm.weight": np.ones(31, dtype=np.float32)})
    with pytest.raises(DynexportError, match=r"model\.norm\.weight: expected shape \(32,\).*found \(31,\)"):
        Reference.from_checkpoint(checkpoint)


@pytest.mark.parametrize("fields", [{"model_type": "nonesuch"}, {"hidden_size": "wide"}])
def test_a_config_that_transformers_refuses_is_one_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(DynexportError, match="transformers cannot build") as caught:
        Reference.from_checkpoint(changed(tmp_path, {}, **fields))
    assert "\n" not in str(caught.value)


def test_a_saved_base_model_is_read(family_directory: Path, tmp_path: Path) -> None:
    """Older checkpoints were saved from the model without its head, so their names lack its prefix."""
    checkpoint = Directory(family_directory)
    prefix = ordinary_model(family_directory).base_model_prefix + "."
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    bare = {name.removeprefix(prefix): checkpoint.read(name) for name in checkpoint.names}
    save_file(bare, tmp_path / "model.safetensors")
    rows = random_rows(5)
    expected = Reference.from_checkpoint(checkpoint).logits(rows)
    np.testing.assert_array_equal(Reference.from_checkpoint(Directory(tmp_path)).logits(rows)[0], expected[0])


def test_longrope_stops_where_a_row_would_depend_on_its_batch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    checkpoint = changed(tmp_path, {}, rope_parameters=rope)
    with pytest.raises(DynexportError, match="expected 1 to 16 tokens, found 17"):
        Reference.from_checkpoint(checkpoint).logits([[1] * 17])


def test_importing_it_does_not_import_torch() -> None:
    program = "import sys, dynexport.exporter.reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
