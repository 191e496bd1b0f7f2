"""Bundles of a GGUF's own blocks against PyTorch with the values that the gguf package makes of them.

Models as small as these keep activations in float32, so the bundles run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import onnx
import pytest
from conversation import EVERYTHING, Conversation, follow
from gguf import GGMLQuantizationType as Kind
from gguf_models import MODULES, save_dequantised, write_gguf

from dynexport.exporter.bundle.conversion import Conversion, convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Reference
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.execution.executor import Executor

pytest.importorskip("transformers")

WITHOUT_MINIMA = (Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.Q3_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4)
WITH_MINIMA = (Kind.Q4_1, Kind.Q5_1, Kind.Q2_K, Kind.Q4_K, Kind.Q5_K)
# In units of a row's spread. Float32 on both sides gives up to 1.5e-5; minima are kept to a few hundredths of a scale.
EXACT, NEARLY = 1e-4, 2e-2
KEPT, BEFORE_EXIT = (0, 2), (0, 1, 2)
STRATEGIES: dict[str, dict[str, Any]] = {
    "dense": {"strategy": "dense"},
    "unified-skip": {"strategy": "unified-skip", "keep": KEPT},
    "static": {"strategy": "unified-skip", "keep": KEPT, "static": True},
    "early-exit": {"strategy": "early-exit", "fields": {"exits": [len(BEFORE_EXIT)]}},
}
# The layers that generated tokens run.
RUN = {"dense": EVERYTHING, "early-exit": BEFORE_EXIT}
# As llama.cpp's Q4_K_M: half of the values and down projections have more bits, and so has the embedding.
MIXED = {
    "attn_v": Kind.Q6_K,
    "ffn_down": Kind.Q6_K,
    "output": Kind.Q6_K,
    "token_embd": Kind.Q4_K,
    "attn_output": Kind.F16,
}


def mixed(name: str) -> Kind:
    layer, _, module = name.removesuffix(".weight").removeprefix("blk.").rpartition(".")
    return MIXED.get(module, Kind.Q4_K) if layer in ("", "0", "2") else Kind.Q4_K


class Case:
    """A file, the same model in PyTorch, and its bundles."""

    def __init__(self, directory: Path, architecture: str, choose: Callable[[str], Kind], *, tied: bool) -> None:
        self.directory, self.file = directory, directory / "model.gguf"
        tensors = write_gguf(self.file, architecture, choose, tied=tied)
        save_dequantised(directory / "dequantised", self.file, tensors)
        self.reference = Reference.from_checkpoint(open_checkpoint(directory / "dequantised"))
        self.converted: dict[str, Conversion] = {}

    def executor(self, strategy: str) -> Executor:
        bundle = self.directory / strategy
        self.converted[strategy] = convert(self.file, bundle, golden=False, **STRATEGIES[strategy])
        return Executor(Bundle.open(bundle), 1)

    def error(self, strategy: str) -> float:
        kept = RUN.get(strategy, KEPT)
        talk, run = Conversation.forced(self.reference, kept, kept), self.executor(strategy)
        return float(
            max(follow(run, talk, rows=rows, chunk=chunk).max() for rows, chunk in (([0, 1, 2, 3], 64), ([3], 4)))
        )


Cases = Callable[..., Case]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    @cache
    def make(architecture: str, kinds: tuple[Kind, ...] = (), tied: bool = False) -> Case:
        turns = cycle(kinds)
        choose = (lambda _: next(turns)) if kinds else mixed
        return Case(
            tmp_path_factory.mktemp("gguf"), architecture, choose, tied=tied or architecture.startswith("gemma")
        )

    return make


@pytest.mark.parametrize("architecture", MODULES)
def test_blocks_without_minima_are_exact(architecture: str, case: Cases) -> None:
    made = case(architecture, WITHOUT_MINIMA)
    assert made.error("dense") < EXACT
    told = made.converted["dense"].matrices
    assert {each.kind for each in told} == {kind.name for kind in WITHOUT_MINIMA}
    assert {each.error for each in told} == {0}


@pytest.mark.parametrize("architecture", MODULES)
def test_blocks_with_minima_are_nearly_exact(architecture: str, case: Cases) -> None:
    made = case(architecture, WITH_MINIMA)
    assert made.error("dense") < NEARLY
    told = made.converted["dense"].matrices
    assert {each.kind for each in told} == {kind.name for kind in WITH_MINIMA}
    assert all(each.error is not None and 0 < each.error < 1 / 16 for each in told)


@pytest.mark.parametrize("kind", [*WITHOUT_MINIMA, *WITH_MINIMA], ids=lambda kind: kind.name)
def test_every_type_alone(kind: Kind, case: Cases) -> None:
    assert case("llama", (kind,)).error("dense") < (EXACT if kind in WITHOUT_MINIMA else NEARLY)


@pytest.mark.parametrize("architecture", MODULES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed_types(architecture: str, strategy: str, case: Cases) -> None:
    assert case(architecture).error(strategy) < NEARLY


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q6_K, Kind.Q8_0, *WITH_MINIMA], ids=lambda kind: kind.name)
def test_a_tied_table_is_stored_once(kind: Kind, case: Cases) -> None:
    made = case("llama", (kind,), tied=True)
    assert made.error("dense") < (EXACT if kind in WITHOUT_MINIMA else NEARLY)
    graph = onnx.load(made.directory / "dense" / "model.onnx", load_external_data=False).graph
    outer = [tensor.name for tensor in graph.initializer if "embed" in tensor.name or "head" in tensor.name]
    assert sorted({name.partition("weight")[2] for name in outer}) == sorted(
        ["_quantized", "_scales"] + ["_zero_points"] * (kind in WITH_MINIMA)
    )
    assert len(outer) == len(set(outer)) <= 3


def test_products_of_one_input_share_its_sums(case: Cases) -> None:
    case("llama", (Kind.Q4_1,)).error("dense")
    graph = onnx.load(case("llama", (Kind.Q4_1,)).directory / "dense" / "model.onnx", load_external_data=False).graph
    sums = [node for node in graph.node if node.op_type == "ReduceSum" and "layers.0." in "".join(node.output)]
    products = [node for node in graph.node if node.op_type == "MatMulNBits" and "layers.0." in node.input[1]]
    # q, k and v are one product; gate and up are two with one input.
    assert len(products) == 5 and len(sums) == 4
