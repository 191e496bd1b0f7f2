"""A GGUF file's blocks are the numbers that the gguf package dequantises, to the last bit, whatever their bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from test_gguf_file import finish, make_model, make_writer

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.blocks import Blocks, stack
from dynexport.exporter.checkpoint.gguf_blocks import unpack

# Type -> bits, values per block, and whether blocks have minima.
KINDS = {
    Kind.Q4_0: (4, 32, False),
    Kind.Q4_1: (4, 32, True),
    Kind.Q5_0: (5, 32, False),
    Kind.Q5_1: (5, 32, True),
    Kind.Q8_0: (8, 32, False),
    Kind.Q2_K: (2, 16, True),
    Kind.Q3_K: (3, 16, False),
    Kind.Q4_K: (4, 32, True),
    Kind.Q5_K: (5, 32, True),
    Kind.Q6_K: (6, 16, False),
    Kind.IQ4_NL: (8, 32, False),
    Kind.IQ4_XS: (8, 32, False),
    Kind.MXFP4: (5, 32, False),
}


def unpacked(rows: np.ndarray, kind: Kind) -> Blocks:
    found = unpack(rows, kind)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5), blocks=st.integers(1, 3))
def test_any_bytes_are_the_numbers_of_the_gguf_package(kind: Kind, seed: int, count: int, blocks: int) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(seed).integers(0, 256, (count, blocks * size), dtype=np.uint8)
    found = unpacked(rows, kind)
    bits, values, has_minima = KINDS[kind]
    assert (found.kind, found.bits, found.size) == (kind.name, bits, values)
    assert found.shape == (count, blocks * block) and found.scale.shape == found.q.shape[:2]
    assert found.q.dtype == np.uint8 and found.q.max() < 2**bits and (found.minimum is not None) == has_minima
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, kind)
        np.testing.assert_array_equal(found.values(), expected)
        assert found.values().dtype == np.float32


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.F32, Kind.IQ2_XXS, Kind.TQ2_0])
def test_other_types_have_no_blocks(kind: Kind) -> None:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    assert unpack(np.zeros((2, size), np.uint8), kind) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3"])
def test_blocks_have_the_rows_of_read(tmp_path: Path, architecture: str) -> None:
    tensors, names = make_model(architecture)
    writer = make_writer(tmp_path / "model.gguf", architecture)
    for name, values in tensors.items():
        if values.ndim == 2:
            writer.add_tensor(names[name], gguf.quants.quantize(values, Kind.Q4_1), raw_dtype=Kind.Q4_1)
        else:
            writer.add_tensor(names[name], values)
    finish(writer)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    for name, values in tensors.items():
        blocks = checkpoint.blocks(name)
        assert (blocks is not None) == (values.ndim == 2), name
        if blocks is not None:
            np.testing.assert_array_equal(blocks.values(), checkpoint.read(name), err_msg=name)


def test_neighbours_of_one_type_are_joined() -> None:
    generator = np.random.default_rng(1)

    def matrix(kind: Kind, rows: int) -> Blocks:
        return unpacked(gguf.quants.quantize(generator.standard_normal((rows, 64)).astype(np.float32), kind), kind)

    parts = [matrix(Kind.Q4_1, 3), matrix(Kind.Q4_1, 2), matrix(Kind.Q8_0, 4), matrix(Kind.Q4_1, 1)]
    stacked = stack(parts)
    assert [(part.kind, part.shape) for part in stacked] == [("Q4_1", (5, 64)), ("Q8_0", (4, 64)), ("Q4_1", (1, 64))]
    together = np.concatenate([part.values() for part in stacked])
    np.testing.assert_array_equal(together, np.concatenate([part.values() for part in parts]))
