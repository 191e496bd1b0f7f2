"""The CUDA kernels: compiled for every target; run on the host, and on a GPU where there is one, against their meaning.

On the host a block's threads are fibers: arithmetic, indexing, barriers and warp operations are the kernels' own, but
data races and the driver are not put to the test.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_memory import Gpu, Host
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ir import DataType
from operator_models import BY_NAME, Arrays, agree, draw, session

from dynexport.plugins import creators
from dynexport.plugins.driver import Kernels
from dynexport.plugins.kernels import LAUNCHES, SOURCE, compile_kernels, compile_ptx, find_nvcc, read_sizes
from dynexport.plugins.schema import FLOATS, T
from dynexport.runtime.bundle.errors import DynexportError

TOLERANCES = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 5e-3, np.dtype(ml_dtypes.bfloat16): 4e-2}
SIZES = {"B": 3, "S": 1_500, "H": 300, "K": 37, "h": 2, "M": 50, "D": 130, "L": 3, "J": 21, "N": 5}
Run = Callable[[str, Arrays], list[NDArray[Any]]]


def runner(memory: Host | Gpu, kernels: Kernels) -> Run:
    def run(name: str, arrays: Arrays, *, in_place: bool = False) -> list[NDArray[Any]]:
        operator = BY_NAME[name]
        own = [np.ascontiguousarray(array) for array in arrays.values()]
        sizes = read_sizes(operator, [array.shape for array in own])
        outputs = [
            np.zeros(
                [sizes[letter] for letter in tensor.dims],
                own[0].dtype if tensor.dtype == T else DataType(tensor.dtype).numpy(),
            )
            for tensor in operator.outputs
        ]
        inputs = [memory.put(array) for array in own]
        pointers = [memory.put(array) for array in outputs]
        if in_place:
            outputs[0], pointers[0] = own[0], inputs[0]
        dtypes = [DataType.from_numpy(array.dtype) for array in own]
        creators.run(operator, kernels, [array.shape for array in own], dtypes, inputs, pointers, stream=0)
        found = [memory.get(pointer, output) for pointer, output in zip(pointers, outputs, strict=True)]
        memory.free()
        return found

    return run


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return find_nvcc()
    except DynexportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels(tmp_path_factory.mktemp("kernels") / "kernels.fatbin")


@pytest.fixture(scope="module")
def on_host(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    library = tmp_path_factory.mktemp("host") / "libcuda_on_host.so"
    source = Path(__file__).parent / "kernels_on_host.cpp"
    headers = Path(nvcc).resolve().parents[1] / "include"
    options = ("-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-isystem", str(headers))
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    return runner(Host(), Kernels(SOURCE, library=str(library)))


@pytest.fixture(scope="module")
def on_gpu(request: pytest.FixtureRequest) -> Run:
    try:
        gpu = Gpu()
    except OSError as error:
        pytest.skip(f"no GPU: {error}")
    return runner(gpu, Kernels(request.getfixturevalue("compiled")))


@pytest.fixture(params=["host", "gpu"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(f"on_{request.param}")
    return found


def test_all_targets_compile(compiled: Path) -> None:
    data = compiled.read_bytes()
    assert all(launch.name(None).encode() in data for launch in LAUNCHES.values())


def test_ptx_has_a_kernel_of_every_operator_and_type(nvcc: str, tmp_path: Path) -> None:
    text = compile_ptx(tmp_path / "kernels.ptx").read_text()
    for name, launch in LAUNCHES.items():
        arguments = len(launch.operator.inputs) + len(launch.sizes) + len(launch.operator.outputs)
        for dtype in FLOATS if name != "CapacityTopK" else (None,):
            entry = text.split(f".entry {launch.name(dtype)}(")[1].split(")")[0]
            kinds = [line.split()[1] for line in entry.strip().splitlines()]
            assert kinds.count(".u32") == len(launch.sizes)
            assert len(kinds) == arguments


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kernel_means_what_the_operator_means(run: Run, name: str, dtype: np.dtype[Any]) -> None:
    arrays = draw(name, SIZES, 1, dtype)
    agree(name, run(name, arrays), arrays, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("name", BY_NAME)
def test_kernel_gives_what_the_body_gives(run: Run, name: str) -> None:
    arrays = draw(name, SIZES, 2)
    for own, body in zip(run(name, arrays), session(name).run(None, arrays), strict=True):
        if name != "CapacityTopK":
            np.testing.assert_allclose(own, body, rtol=1e-5, atol=1e-5)
        elif own.dtype == np.int32:
            np.testing.assert_array_equal(own, body)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 70), slots=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_choices_of_short_rows(on_host: Run, length: int, slots: int, seed: int) -> None:
    arrays = draw("CapacityTopK", {"B": 2, "S": length, "K": min(length, slots)}, seed)
    agree("CapacityTopK", on_host("CapacityTopK", arrays), arrays, tolerance=0)


@pytest.mark.parametrize("count", [0, 1, 1_024, 4_095, 4_096])
def test_choices_of_a_long_row(run: Run, count: int) -> None:
    random = np.random.default_rng(count)
    # Few values: the threshold falls among ties.
    scores = random.integers(-3, 3, (1, 4_096)).astype(np.float32)
    arrays = {"scores": scores, "counts": np.array([count]), "slots": np.arange(4_096)}
    agree("CapacityTopK", run("CapacityTopK", arrays), arrays, tolerance=0)


@pytest.mark.parametrize(
    ("scores", "count", "chosen"),
    [
        ([-0.0, 0.0, -0.0, 0.0, -1.0], 3, [0, 1, 2]),
        ([np.nan, 1.0, -np.inf, 2.0], 4, [1, 3]),
        ([np.nan, -np.nan, -np.inf], 2, []),
        ([np.inf, 3.4e38, np.inf, np.nan], 3, [0, 1, 2]),
        ([1.0, 2.0], -1, []),
        ([1.0, 2.0], 2**40, [0, 1]),
    ],
)
def test_choices_that_are_easily_wrong(run: Run, scores: list[float], count: int, chosen: list[int]) -> None:
    slots = np.arange(len(scores))
    arrays = {"scores": np.array([scores], np.float32), "counts": np.array([count]), "slots": slots}
    for positions, valid in (run("CapacityTopK", arrays), session("CapacityTopK").run(None, arrays)):
        assert positions[valid == 1].tolist() == chosen


@pytest.mark.parametrize("name", ["GatedScatterAdd", "RaggedKVAppend"])
def test_in_place(run: Run, name: str) -> None:
    arrays = draw(name, SIZES, 3)
    before = {key: array.copy() for key, array in arrays.items()}
    agree(name, run(name, arrays, in_place=True), before, tolerance=1e-5)  # type: ignore[call-arg]


def test_an_index_that_is_no_layer_gives_zeros(run: Run) -> None:
    arrays = {**draw("SelectedMatMul", SIZES, 4), "index": np.array([0, -1, 3, 2, 1])}
    arrays["x"] = np.nan_to_num(arrays["x"], nan=1.0)
    (found,) = run("SelectedMatMul", arrays)
    assert not found[1:3].any() and found[[0, 3, 4]].any(axis=1).all()


def test_nothing_to_do_launches_nothing(on_host: Run) -> None:
    arrays = {"x": np.zeros((0, 4), np.float32), "weight": np.zeros((2, 3, 4), np.float32), "index": np.zeros(0, int)}
    assert on_host("SelectedMatMul", arrays)[0].shape == (0, 3)


def test_shapes_that_do_not_fit_are_told(on_host: Run) -> None:
    arrays = draw("SelectedMatMul", SIZES, 5)
    with pytest.raises(DynexportError, match="SelectedMatMul: N of index is 4, expected 5"):
        on_host("SelectedMatMul", {**arrays, "index": arrays["index"][:4]})
    with pytest.raises(DynexportError, match="S of scores is 2147483648, expected 1073741824 at most"):
        read_sizes(BY_NAME["CapacityTopK"], [(1, 2**31), (1,), (1,)])
    with pytest.raises(DynexportError, match=r"x has shape \[1\], expected NK"):
        read_sizes(BY_NAME["SelectedMatMul"], [(1,), (1, 1, 1), (1,)])
    with pytest.raises(DynexportError, match="CapacityTopK: 3 slots for 2 scores"):
        on_host(
            "CapacityTopK", {"scores": np.zeros((1, 2), np.float32), "counts": np.ones(1, int), "slots": np.arange(3)}
        )


def test_missing_kernels_and_compilers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DynexportError, match="CapacityTopK cannot run without its kernels"):
        creators.run(BY_NAME["CapacityTopK"], None, [], [], [], [], 0)
    with pytest.raises(DynexportError, match=r"absent\.fatbin: no such file"):
        Kernels(tmp_path / "absent.fatbin")
    with pytest.raises(DynexportError, match=r"libabsent\.so cannot be loaded"):
        Kernels(SOURCE, library="libabsent.so")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DynexportError, match="nvcc is needed"):
        compile_kernels(tmp_path / "kernels.fatbin")


def test_what_nvcc_says_is_told_in_one_line(nvcc: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=r"nvcc failed on kernels\.cu with exit code .*compute_1"):
        compile_kernels(tmp_path / "kernels.fatbin", architectures=("1",))
