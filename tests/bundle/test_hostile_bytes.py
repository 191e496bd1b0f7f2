"""Files from elsewhere with any bytes changed: they are read, or refused in one line; no other exception, no hang."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE, copied
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dynexport.exporter.bundle.contract import read_contract
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.sizes import check_sizes
from dynexport.exporter.families import read_architecture
from dynexport.exporter.strategies import strategies
from dynexport.runtime import Bundle, DynexportError, Model

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
NASTY = (
    *(None, True, False, 0, -1, 1, 7, 2**31 - 1, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e300, -1e-300),
    *("", "x", "x" * 2000, "\x1b[31m", "\u202e", "../x", "a\0b", "1", "inf", "dense", "B"),
    *([], {}, [[]], [0, 0], {"": 0}, [-1], [10**30], {"a": {"a": {"a": {}}}}),
)
Json = Any


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, end: int) -> bytes:
    """Content with a few changes before ``end``: bytes overwritten, cut out, put in, or moved."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, end - 1))
        length = draw(st.sampled_from([0, 1, 2, 8, 64]))
        put = draw(st.sampled_from([b"", b"\0", b"\xff" * 8, b"9" * 30, b"[" * 2000, b'"', b"}", b"\x80", b"\n"]))
        changed[place : place + length] = put or draw(st.binary(min_size=length, max_size=length))
    return bytes(changed)


def places(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in JSON."""
    if path:
        yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def changed_json(draw: st.DrawFn, value: Json) -> Json:
    """JSON with a few of its values replaced, removed, put twice, or put where others were."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(value))
        *way, last = draw(st.sampled_from(known))
        parent = value
        for key in way:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif isinstance(parent, list):
            parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(parent[last]))
        elif draw(st.booleans()):
            del parent[last]
        else:
            parent[draw(st.sampled_from(["", "x", *map(str, parent)]))] = copy.deepcopy(parent[last])
    return value


def read_or_refused(use: Callable[[], object]) -> None:
    """Run it: any exception but ours is a fault, and ours is one line that ends."""
    try:
        use()
    except DynexportError as error:
        assert str(error).isprintable() and len(str(error)) <= 900


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(CONFORMANCE / "mod-router", tmp_path_factory.mktemp("hostile") / "model"))


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for name, size in (("block_count", 1), ("embedding_length", 8), ("feed_forward_length", 8), ("context_length", 64)):
        writer.add_uint32(f"llama.{name}", size)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab"])
    tensors = load_file(CONFORMANCE / "dense" / "model.safetensors")
    for name in ("token_embd", "output_norm", "blk.0.attn_q"):
        writer.add_tensor(f"{name}.weight", tensors["model.layers.0.mlp.up_proj.weight"][:8, :8].copy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def use_checkpoint(path: Path) -> None:
    """What a conversion does before it builds a graph."""
    checkpoint = open_checkpoint(path)
    check_sizes(checkpoint)
    for name in list(checkpoint.names)[:2]:
        checkpoint.read(name)
    architecture = read_architecture(checkpoint.config)
    contract = read_contract(checkpoint)
    strategies()[contract.strategy].depths(contract, architecture.layers)


@few
@given(data=st.data())
def test_safetensors(model: Path, data: st.DataObject) -> None:
    path = model / "model.safetensors"
    content = (CONFORMANCE / "mod-router" / "model.safetensors").read_bytes()
    path.write_bytes(data.draw(changed_bytes(content, 8 + int.from_bytes(content[:8], "little"))))
    read_or_refused(lambda: use_checkpoint(model))
    path.write_bytes(content)


@few
@given(data=st.data())
def test_config(model: Path, data: st.DataObject) -> None:
    content = (CONFORMANCE / "mod-router" / "config.json").read_bytes()
    if data.draw(st.booleans()):
        changed = data.draw(changed_bytes(content, len(content)))
    else:
        changed = json.dumps(data.draw(changed_json(json.loads(content)))).encode()
    (model / "config.json").write_bytes(changed)
    read_or_refused(lambda: use_checkpoint(model))
    (model / "config.json").write_bytes(content)


@few
@given(data=st.data())
def test_gguf(gguf_model: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = gguf_model.read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(changed_bytes(content, content.rindex(b"attn_q") + 40)))
    read_or_refused(lambda: use_checkpoint(path))


@few
@given(data=st.data())
def test_manifest(skip_bundle: Path, tmp_path: Path, data: st.DataObject) -> None:
    bundle = tmp_path / "bundle"
    if not bundle.exists():
        copied(skip_bundle, bundle)
    content = (skip_bundle / "manifest.json").read_bytes()
    if data.draw(st.booleans()):
        changed = data.draw(changed_bytes(content, len(content)))
    else:
        changed = json.dumps(data.draw(changed_json(json.loads(content)))).encode()
    (bundle / "manifest.json").write_bytes(changed)
    read_or_refused(lambda: Model(Bundle.open(bundle), threads=1).generate([[1, 2, 3]], max_new_tokens=2))
