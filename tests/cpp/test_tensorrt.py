"""The C++ runtime on TensorRT's engines, by stand-ins for CUDA and TensorRT that compute: the same as Python's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin_machine import CASES, CONTEXT, ROWS, STEP, Machine, Ops, engines, machine, needs_standins
from tiny_models import random_rows

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.shapes import profile_for
from dynexport.runtime.execution.executor import Executor

Array = np.ndarray

__all__ = ["engines", "machine"]  # fixtures
pytestmark = needs_standins


def talk(bundle: Path, lengths: tuple[int, ...]) -> tuple[Ops, list[list[Array]]]:
    """Prompts in a batch, steps at the first depth and at full depth, further prompts; and Python's logits of them."""
    executor = Executor(Bundle.open(bundle), 1)
    vocabulary, rows = executor.manifest.model.vocab_size, list(range(len(lengths)))
    first, second = (
        [[token % vocabulary for token in row] for row in random_rows(*sizes, seed=seed)]
        for seed, sizes in ((1, lengths), (2, [5] * len(lengths)))
    )
    state = executor.full_cache(len(lengths), CONTEXT)
    ops: Ops = [{"op": "cache", "rows": len(lengths), "tokens": CONTEXT}]
    found: list[list[Array]] = [[]]

    def prompts(tokens: list[list[int]]) -> None:
        ops.append({"op": "prompt", "rows": rows, "tokens": tokens})
        found.append(list(executor.prefill(state, tokens, all_logits=True)))

    prompts(first)
    for depth in (None, None, None, "full"):
        tokens = [int(row[-1].argmax() if row.ndim == 2 else row.argmax()) for row in found[-1]]
        ops.append({"op": "decode", "rows": rows, "tokens": tokens} | ({"depth": depth} if depth else {}))
        found.append(list(executor.step(state, np.array(tokens), executor.bundle.depth(depth))))
    prompts(second)
    return ops, found


def same(results: Any, expected: list[list[Array]]) -> None:
    for result, rows in zip(results, expected, strict=True):
        assert "error" not in result, result
        for own, other in zip(result.get("logits", []), rows, strict=True):
            own = np.array(own).reshape(other.shape)
            np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)
            assert (own.argmax(-1) == other.argmax(-1)).all()


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_python_on_onnxruntime(case: str, engines: Callable[[str], Path], machine: Machine) -> None:
    """At batches and lengths that no profile names as its usual ones; and nothing is left of it afterwards."""
    bundle = engines(case)
    for lengths in ((3, 8, 1), (17,), (2, 2, 5, 7)):
        ops, expected = talk(bundle, lengths)
        same(machine.talk(bundle, ops), expected)
        cuda, tensorrt = machine.told("cuda"), machine.told("tensorrt")
        assert [cuda[kind] for kind in ("used", "host", "streams", "graphs", "captured")] == [0] * 5
        assert tensorrt["live"] == 0 and tensorrt["in_place"] > 0
        assert cuda["calls"]["cuGraphLaunch"] > 0
    read = {Path(model).name for model in tensorrt["read"]}
    assert read <= {graph.file for graph in Bundle.open(bundle).manifest.graphs} and read


def test_entries_are_copied_saved_and_restored(engines: Callable[[str], Path], machine: Machine) -> None:
    """A row whose entries came from another one, by the device or by the host, goes on as that one would."""
    bundle = engines("dense")
    ops: Ops = [
        {"op": "cache", "rows": 3, "tokens": CONTEXT},
        {"op": "prompt", "rows": [0], "tokens": [[3, 1, 4, 1, 5]]},
        {"op": "copy", "row": 0, "target": 1},
        {"op": "save", "row": 0, "target": 2},
        *({"op": "decode", "rows": [row], "tokens": [9]} for row in (0, 1, 2)),
    ]
    *_, first, copied, restored = machine.talk(bundle, ops)
    assert first["logits"] == copied["logits"] == restored["logits"]
    assert machine.told("cuda")["calls"]["cuMemcpy2DUnaligned"] > 0


def test_threads_share_engines(engines: Callable[[str], Path], machine: Machine) -> None:
    bundle = engines("skip-2x")
    ops, expected = talk(bundle, (3, 8))
    for results in machine.talk(bundle, ops * 3, threads=3):
        same(results, expected * 3)


def test_a_step_that_cannot_be_captured(engines: Callable[[str], Path], machine: Machine) -> None:
    """It runs as it is, and is not tried again for this cache."""
    bundle = engines("dense")
    ops, expected = talk(bundle, (2, 3))
    for settings in ({"uncapturable": True}, {"errors": {"cuGraphInstantiate": 1}}):
        same(machine.talk(bundle, ops, settings), expected)
        calls = machine.told("cuda")["calls"]
        assert calls["cuStreamBeginCapture"] <= 3 and "cuGraphLaunch" not in calls


# What fails


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"fails": "IExecutionContext::enqueueV3: Error Code 1: Cask (no\nkernel)"},
            "graph model: TensorRT failed in a step: Cask (no kernel)",
        ),
        (
            {"refuses": "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (stale)"},
            "graph model: TensorRT refuses its engine: API Usage Error (stale)",
        ),
        ({"errors": {"cuMemcpyHtoDAsync": 1}}, "cuMemcpyHtoDAsync: CUDA error 1: invalid argument"),
        (
            {"memory": 50_000},
            "cuMemAlloc: the GPU has not enough memory; lower the batch, or convert with a smaller --max-length",
        ),
    ],
)
def test_a_step_that_fails(
    settings: dict[str, Any], expected: str, engines: Callable[[str], Path], machine: Machine
) -> None:
    results = machine.talk(engines("dense"), STEP, settings)
    assert results[-1] == {"error": expected}
    assert machine.told("cuda")["used"] == 0 and machine.told("tensorrt")["live"] == 0


def test_sizes_that_no_profile_has_room_for(engines: Callable[[str], Path], machine: Machine) -> None:
    bundle = engines("dense")
    (graph,) = Bundle.open(bundle).manifest.graphs
    sizes = {"B": 1, "S": 10, "K": 1}
    with pytest.raises(DynexportError) as refused:
        profile_for(graph, sizes)
    results = machine.talk(
        bundle,
        [{"op": "call", "graph": "model", "sizes": sizes}, {"op": "cache", "rows": ROWS + 1, "tokens": CONTEXT}],
    )
    assert results[0] == {"error": str(refused.value)}
    assert f"batch: expected at most {ROWS} rows" in results[1]["error"] and "found 5" in results[1]["error"]
