"""Bad input of every kind: exit code 2, one line that says what and where, and nothing written or lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import (
    change_manifest,
    change_tensors,
    checkpoint,
    contents,
    copied,
    dynexport,
    error_of,
    replace_file,
)

NORM = "model.layers.3.input_layernorm.weight"
QUERY = "model.layers.3.self_attn.q_proj.weight"


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def truncated(model: Path) -> None:
    weights(model).write_bytes(weights(model).read_bytes()[:-100])


def sharded(model: Path) -> None:
    weights(model).unlink()
    index = {"metadata": {}, "weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def transposed(model: Path) -> None:
    change_tensors(model, lambda t: t.update({QUERY: np.zeros((32, 31), np.float32)}))


def not_finite(value: float) -> Callable[[Path], None]:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors[QUERY][3, 4] = value

    return lambda model: change_tensors(model, damage)


def without_a_tensor(model: Path) -> None:
    change_tensors(model, lambda t: t.pop(QUERY))


def config(**fields: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def in_its_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else under the name of a file."""

    def change(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return change


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda m: weights(m).unlink(), "model.safetensors or model.safetensors.index.json, found neither"),
    "no config": (lambda m: (m / "config.json").unlink(), "expected config.json"),
    "config that is not JSON": (lambda m: (m / "config.json").write_text("{"), "config.json: expected JSON"),
    "truncated weights": (truncated, "expected a safetensors file, found"),
    "empty weights": (lambda m: weights(m).write_bytes(b""), "expected a safetensors file, found 0 bytes"),
    "an absent shard": (sharded, "names the shard model-00001-of-00002.safetensors, which is not there"),
    "a wrong shape": (
        transposed,
        "expected shape [64, 32] as config.json says, found [32, 31], [16, 32], [16, 32]",
    ),
    "an absent tensor": (without_a_tensor, f"no tensor {QUERY}"),
    "NaN": (not_finite(np.nan), f"tensor {QUERY}: expected finite numbers, found NaN or infinity"),
    "infinity": (not_finite(-np.inf), f"tensor {QUERY}: expected finite numbers, found NaN or infinity"),
    "an unknown family": (config(model_type="mamba"), "'mamba'"),
    "no family": (config(model_type=None), "model_type"),
    "an unknown activation": (config(hidden_act="swoosh"), "'swoosh'"),
    "an unknown strategy": (config(dynexport={"strategy": "guess"}), "strategy: expected"),
    "a strategy of another type": (config(dynexport={"strategy": ["dense"]}), "strategy: expected"),
    "an unknown field of the contract": (config(dynexport={"strategy": "unified-skip", "depth": 2}), "depth"),
    "a contract that is no object": (config(dynexport=[1]), "config.json: dynexport: expected an object, found [1]"),
    "layers that are none": (config(num_hidden_layers=0), "num_hidden_layers"),
    "layers without end": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers: expected at most 75, the number of tensors, found 1000000000; use the",
    ),
    "layers of a graph too large to build": (config(num_hidden_layers=4096), "num_hidden_layers: expected at most 75"),
    "width without end": (config(hidden_size=10**9), "hidden_size: expected at most 89, the largest dimension of the"),
    "a head without end": (config(head_dim=10**9), "head_dim: expected at most 89"),
    "a vocabulary without end": (config(vocab_size=2**31 - 1), "vocab_size: expected at most 89"),
    "a pipe for a config": (in_its_place("config.json", os.mkfifo), "config.json: expected a file, found a pipe"),
    "a pipe for weights": (
        in_its_place("model.safetensors", os.mkfifo),
        "model.safetensors: expected a file, found a p",
    ),
    "a pipe for a tokenizer": (
        in_its_place("tokenizer.json", os.mkfifo),
        "tokenizer.json: expected a file, found a pipe",
    ),
    "a directory for a config": (in_its_place("config.json", Path.mkdir), "config.json: expected a file, found a dire"),
    "a link to nowhere": (
        in_its_place("generation_config.json", lambda path: path.symlink_to("nowhere")),
        "generation_config.json: expected a file, found a link that leads nowhere",
    ),
    "a device for weights": (
        in_its_place("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "model.safetensors: expected a file, found a device",
    ),
    "a config without end": (lambda m: (m / "config.json").write_text('{"a":' * 10**5), "more than 64 levels"),
    "a field twice": (
        lambda m: (m / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'),
        "'vocab_size' is there twice",
    ),
    "sampling that nobody can do": (
        lambda m: (m / "generation_config.json").write_text('{"top_p": 7}'),
        "generation_config.json: top_p: expected 0 < top_p <= 1, found 7",
    ),
    "more layers than there are": (config(num_hidden_layers=9), "no tensor model.layers.8."),
}


@pytest.mark.parametrize(("damage", "expected"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_bad_checkpoints(tmp_path: Path, skip_bundle: Path, damage: Callable[[Path], object], expected: str) -> None:
    model = checkpoint(tmp_path / "model")
    damage(model)
    output = copied(skip_bundle, tmp_path / "out" / "bundle")
    before = contents(tmp_path)
    message = error_of(dynexport("convert", model, "--no-golden", "-o", output))
    assert expected in message
    assert str(model) in message or "config.json" in message
    assert contents(tmp_path) == before


CONVERT: dict[str, tuple[list[str], str]] = {
    "ratio 0": (["--speedup", "0"], "expected finite ratios >= 1, found 0.0"),
    "ratio below 1": (["--speedup", "0.99"], "expected finite ratios >= 1, found 0.99"),
    "negative ratio": (["--speedup", "-1"], "expected finite ratios >= 1, found -1.0"),
    "huge ratio": (["--speedup", "1e9"], "speedup 1e+09: expected a ratio that keeps at least 2 of 8 layers"),
    "one bad ratio of two": (["--speedup", "2", "--speedup", "4.1"], "speedup 4.1: expected a ratio that keeps"),
    "ratio that is no number": (["--speedup", "nan"], "expected finite ratios >= 1, found nan"),
    "infinite ratio": (["--speedup", "inf"], "expected finite ratios >= 1, found inf"),
    "ratio that is a word": (["--speedup", "abc"], "'abc' is not a valid float"),
    "modulo of a fraction": (["--speedup", "1.5", "--rule", "modulo"], "speedup 1.5: expected an integer"),
    "kept set without layers": (["--keep", ""], "keep: expected at least one layer, found none"),
    "kept layer beyond the last": (["--keep", "0,8"], "keep: expected layers 0..7, found 8"),
    "negative kept layer": (["--keep", "-1,0"], "keep: expected layers 0..7, found -1"),
    "kept layers that are words": (["--keep", "0,last"], "--keep: expected whole numbers separated by commas"),
    "kept layers with a gap": (["--keep", "0,,2"], "--keep: expected whole numbers separated by commas"),
    "ratio of a dense model": (["--strategy", "dense", "--speedup", "2"], "speedups"),
    "static dense": (["--strategy", "dense", "--static"], "--static: expected with --strategy unified-skip"),
    "no context": (["--max-length", "0"], "max_length: expected 1..256 tokens, found 0"),
    "more context than the model has": (["--max-length", "257"], "max_length: expected 1..256 tokens, found 257"),
    "no tokenizer there": (["--tokenizer", "nowhere"], "nowhere: expected a tokenizer, found none"),
}


@pytest.mark.parametrize(("arguments", "expected"), CONVERT.values(), ids=CONVERT)
def test_bad_arguments_of_convert(tmp_path: Path, arguments: list[str], expected: str) -> None:
    model = checkpoint(tmp_path / "model")
    ran = dynexport("convert", model, "--no-golden", "-o", tmp_path / "bundle", *arguments)
    assert expected in error_of(ran)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("no/such/model", "no/such/model: no such file or directory"),
        ("", "expected"),
        ("model/config.json", "expected"),
    ],
)
def test_models_that_are_none(tmp_path: Path, model: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(dynexport("convert", model, "-o", "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_weights_too_large_for_float16(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    change_tensors(model, lambda t: t[QUERY].__setitem__((0, 0), 1e5))
    ran = dynexport("convert", model, "--precision", "fp16", "--no-golden", "-o", tmp_path / "bundle")
    assert "expected weights up to 65504 for float16, found larger ones" in error_of(ran)
    assert not (tmp_path / "bundle").exists()


def test_an_output_that_is_not_ours(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    before = contents(tmp_path)
    for output in (model, model / "config.json"):
        assert "choose another -o" in error_of(dynexport("convert", model, "--no-golden", "-o", output))
    assert contents(tmp_path) == before


RUN: dict[str, tuple[list[str], str]] = {
    "no prompt": ([], "expected one of --prompt TEXT, --ids 1,2,3 or --chat"),
    "two prompts": (["--prompt", "a", "--ids", "1"], "expected one of --prompt TEXT"),
    "chat with ids": (["--chat", "--ids", "1"], "expected one of --prompt TEXT"),
    "empty prompt": (["--prompt", ""], "--prompt: expected text, found none"),
    "empty message": (["--chat", "--prompt", ""], "--prompt: expected text, found none"),
    "no ids": (["--ids", ""], "prompt: expected at least one token, found none"),
    "ids that are words": (["--ids", "1,two"], "--ids: expected whole numbers separated by commas, found '1,two'"),
    "ids with a gap": (["--ids", "1,,2"], "--ids: expected whole numbers separated by commas, found '1,,2'"),
    "id beyond the vocabulary": (["--ids", "1,89"], "prompt: expected token ids 0..88, found 89"),
    "negative id": (["--ids", "-1"], "prompt: expected token ids 0..88, found -1"),
    "endless id": (["--ids", "9" * 30], "prompt: expected token ids 0..88, found 999"),
    "long ids": (["--ids", ",".join(["1"] * 257)], "prompt: expected at most 256 tokens to fit the context of 256"),
    "long prompt": (["--prompt", "e" * 257], "prompt: expected at most 256 tokens to fit the context of 256, found"),
    "long message": (["--chat", "--prompt", "e" * 257], "prompt: expected at most 256 tokens"),
    "no new tokens": (["--ids", "1", "--max-new-tokens", "0"], "max_new_tokens: expected at least 1, found 0"),
    "negative new tokens": (["--ids", "1", "--max-new-tokens", "-5"], "max_new_tokens: expected at least 1, found -5"),
    "ratio not declared": (["--ids", "1", "--speedup", "3"], "depth: expected 1, 2; found 3"),
    "ratio nan": (["--ids", "1", "--speedup", "nan"], "depth: expected 1, 2; found nan"),
    "ratio 0": (["--ids", "1", "--speedup", "0"], "depth: expected 1, 2; found 0"),
    "ratio abc": (["--ids", "1", "--speedup", "abc"], "depth: expected 1, 2; found abc"),
    "no temperature": (["--ids", "1", "--temperature", "nan"], "temperature: expected a finite number >= 0, found nan"),
    "below zero": (["--ids", "1", "--temperature", "-1"], "temperature: expected a finite number >= 0, found -1.0"),
    "top-p 0": (["--ids", "1", "--top-p", "0"], "top_p: expected 0 < top_p <= 1, found 0.0"),
    "top-p above 1": (["--ids", "1", "--top-p", "1.1"], "top_p: expected 0 < top_p <= 1, found 1.1"),
    "top-k below 0": (["--ids", "1", "--top-k", "-1"], "top_k: expected an integer >= 0, found -1"),
    "seed below 0": (["--ids", "1", "--seed", "-1"], "seed: expected an integer >= 0, or none, found -1"),
    "empty stop": (["--ids", "1", "--stop", ""], "stop: expected non-empty strings, found an empty one"),
    "no threads": (["--ids", "1", "--threads", "0"], "threads: expected 1..256, found 0"),
    "too many threads": (["--ids", "1", "--threads", "100000"], "threads: expected 1..256, found 100000"),
}


@pytest.mark.parametrize(("arguments", "expected"), RUN.values(), ids=RUN)
def test_bad_arguments_of_run(skip_bundle: Path, arguments: list[str], expected: str) -> None:
    assert expected in error_of(dynexport("run", skip_bundle, *arguments))


@pytest.mark.parametrize("arguments", [["--prompt", "a"], ["--ids", "1", "--stop", "a"]])
def test_text_of_a_bundle_without_a_tokenizer(ids_bundle: Path, arguments: list[str]) -> None:
    assert "tokenizer" in error_of(dynexport("run", ids_bundle, *arguments))


def test_chat_of_a_bundle_without_a_template(ids_bundle: Path) -> None:
    for more in ([], ["--prompt", "a"]):
        ran = dynexport("run", ids_bundle, "--chat", *more, stdin="Hello\n")
        assert "the bundle has no chat template; give a plain prompt instead" in error_of(ran)


def test_a_conversation_that_leaves_the_context(skip_bundle: Path) -> None:
    ran = dynexport("run", skip_bundle, "--chat", "--max-new-tokens", 3, stdin="Hello\n" + "e" * 300 + "\n")
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert "prompt: expected at most" in ran.err


def flipped(bundle: Path) -> None:
    content = bytearray((bundle / "model.data").read_bytes())
    content[1000] ^= 4
    (bundle / "model.data").write_bytes(content)


def leaving(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../../secret"
    replace_file(bundle, "model.onnx", model.SerializeToString())


BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (flipped, "model.data: expected sha256 "),
    "an older schema": (
        lambda b: change_manifest(b, lambda f: f.update(schema_version=1)),
        "expected 2, found 1; convert the",
    ),
    "a newer schema": (
        lambda b: change_manifest(b, lambda f: f.update(schema_version=3)),
        "expected 2, found 3; it was made by a newer dynexport",
    ),
    "external data that leaves it": (leaving, "external data '../../secret' is not a file of the bundle"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "expected a bundle with a manifest.json, found none"),
    "no weights": (lambda b: (b / "model.data").unlink(), "model.data: expected 38"),
}


@pytest.mark.parametrize(("damage", "expected"), BUNDLES.values(), ids=BUNDLES)
def test_bad_bundles_are_refused_by_every_command(
    tmp_path: Path, skip_bundle: Path, damage: Callable[[Path], object], expected: str
) -> None:
    bundle = copied(skip_bundle, tmp_path / "bundle")
    damage(bundle)
    before = contents(tmp_path)
    text = ["--text", bundle / "tokenizer.json"]
    for command, *arguments in (["run", "--ids", "1"], ["inspect"], ["bench"], ["eval", *text], ["verify"]):
        assert expected in error_of(dynexport(command, bundle, *arguments)), command
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--window", "300"], "window: expected 1 <= prompt_tokens < window <= 256"),
        (["--window", "16", "--prompt-tokens", "16"], "found 16 and 16"),
        (["--max-tokens", "10"], "max_tokens: expected at least one window of 256, found 10"),
        (["--window", "100"], "text: expected at least one window of 100 tokens, found 11 tokens"),
        (["--batch", "0"], "batch: expected at least 1, found 0"),
        (["--speedup", "3"], "depth: expected 1, 2; found 3"),
        (["--threads", "-1"], "threads: expected 1..256, found -1"),
        (["--text", "nowhere.txt"], "nowhere.txt: expected a text file, found none"),
        (["--text", "."], ".: expected a text file, found a directory"),
    ],
)
def test_bad_arguments_of_eval(
    tmp_path: Path, skip_bundle: Path, arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("hello there")
    sizes = [] if "--window" in arguments or "--max-tokens" in arguments else ["--window", "8", "--prompt-tokens", "2"]
    assert expected in error_of(dynexport("eval", skip_bundle, "--text", "text.txt", *sizes, *arguments))


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"abc\xff\xfe", "expected UTF-8 text, found invalid start byte at byte 3"), (b"", "found 0"), (b"ab\xe2", "end")],
)
def test_bad_texts_of_eval(tmp_path: Path, skip_bundle: Path, content: bytes, expected: str) -> None:
    (tmp_path / "text").write_bytes(content)
    arguments = ["--text", tmp_path / "text", "--window", 8, "--prompt-tokens", 2]
    assert expected in error_of(dynexport("eval", skip_bundle, *arguments))


def test_a_text_that_is_cut_within_a_character_is_fine(tmp_path: Path, skip_bundle: Path) -> None:
    (tmp_path / "text").write_text("e" * (16 * 8 - 1) + "é" * 100, encoding="utf-8")
    arguments = ["--text", tmp_path / "text", "--window", 8, "--prompt-tokens", 2, "--max-tokens", 8, "--threads", 1]
    assert dynexport("eval", skip_bundle, *arguments).code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt-tokens", "0"], "prompt_tokens: expected at least 1, found 0"),
        (["--new-tokens", "-1"], "new_tokens: expected at least 1, found -1"),
        (["--batch", "0"], "batch: expected at least 1, found 0"),
        (["--repeats", "0"], "repeats: expected at least 1, found 0"),
        (["--prompt-tokens", "8", "--threads", "0"], "threads: expected 1..256, found 0"),
        (["--prompt-tokens", "8", "--speedup", "7"], "depth: expected 1, 2; found 7"),
        (["--prompt-tokens", "250"], "prompt_tokens + new_tokens: expected at most 253"),
        (["--prompt-tokens", "8", "--batch", str(10**15)], "cache: 1000000000000000 rows of 43 tokens need"),
    ],
)
def test_bad_arguments_of_bench(skip_bundle: Path, arguments: list[str], expected: str) -> None:
    assert expected in error_of(dynexport("bench", skip_bundle, *arguments))


@pytest.mark.parametrize("place", ["", "no/such/directory/report.json", "/proc/report.json"])
@pytest.mark.parametrize("command", ["convert", "run", "inspect", "doctor"])
def test_a_report_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, skip_bundle: Path, command: str, place: str
) -> None:
    arguments: dict[str, list[Any]] = {
        "convert": [checkpoint(tmp_path / "model"), "--no-golden", "-o", tmp_path / "bundle"],
        "run": [skip_bundle, "--ids", "1"],
        "inspect": [skip_bundle],
        "doctor": [],
    }
    ran = dynexport(command, *arguments[command], "--json", tmp_path / place)
    assert "--json" in error_of(ran) and "expected a file to write, found" in ran.err
    assert not (tmp_path / "bundle").exists()
