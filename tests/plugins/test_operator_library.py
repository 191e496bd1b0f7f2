"""The C++ plugin library: it compiles against TensorRT's headers alone, and says of the operators what Python says."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from onnx_ir import DataType
from operator_models import BY_NAME

from dynexport.plugins.kernels import find_nvcc
from dynexport.plugins.operators import OPERATORS
from dynexport.plugins.schema import Operator, T
from dynexport.runtime.bundle.errors import DynexportError

ROOT = Path(__file__).parents[2]
# nvinfer1::DataType
NATIVE = {DataType.FLOAT: 0, DataType.FLOAT16: 1, DataType.INT32: 3, DataType.BFLOAT16: 7, DataType.INT64: 8}
FLOATS = [0, 1, 7]


def run(*command: object) -> str:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def headers() -> Path:
    spec = find_spec("kernel_lens")
    if spec is None or shutil.which("cmake") is None:
        pytest.skip("needs cmake, and TensorRT's headers from the kernel-lens package")
    return Path(next(iter(spec.submodule_search_locations or []))) / "include" / "tensorrt"


@pytest.fixture(scope="module")
def nvcc() -> Path:
    try:
        return Path(find_nvcc()).resolve()
    except DynexportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(headers: Path, nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("library")
    # That the kernels compile for all targets is tested elsewhere.
    options = (
        f"-DTENSORRT_INCLUDE_DIR={headers}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=80-real",
    )
    run("cmake", "-S", ROOT / "plugins", "-B", build, *options)
    assert "warning" not in run("cmake", "--build", build)
    return build / "libdynexport_plugins.so"


@pytest.fixture(scope="module")
def ask(library: Path, headers: Path, nvcc: Path) -> Path:
    program = library.parent / "ask_library"
    includes = ("-isystem", headers, "-isystem", nvcc.parents[1] / "include")
    run("g++", "-std=c++17", *includes, Path(__file__).parent / "ask_library.cpp", "-o", program, "-ldl")
    return program


def test_symbols(library: Path) -> None:
    defined = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    assert defined == {"getCreators", "initDynexportPlugins", "setLoggerFinder"}
    undefined = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()}
    system = ("@GLIBC", "@CXXABI", "@GCC", "_ITM_", "__gmon_start__")
    assert {name for name in undefined if not any(part in name for part in system)} == {"getPluginRegistry"}


def answers(ask: Path, library: Path, operator: Operator, types: list[int]) -> list[str]:
    ranks = [len(tensor.dims) for tensor in operator.inputs]
    return run(ask, library, operator.name, *ranks, "--", *types).splitlines()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("generic", FLOATS)
def test_it_says_what_python_says(ask: Path, library: Path, name: str, generic: int) -> None:
    operator = BY_NAME[name]
    tensors = (*operator.inputs, *operator.outputs)
    types = [generic if tensor.dtype == T else NATIVE[DataType(tensor.dtype)] for tensor in tensors]
    said = answers(ask, library, operator, types[: len(operator.inputs)])
    alias = 0 if operator.in_place else -1
    assert said[0] == f"creators {len(OPERATORS)} dynexport 1"
    assert said[1] == f"logged {name}: expected no attributes, found 1, the first named k"
    assert said[2] == "with a field 0"
    assert said[3] == f"name {name} outputs {len(operator.outputs)} alias {alias} fields 0"
    places = [[100 * i + axis for i, axis in map(operator.source, tensor.dims)] for tensor in operator.outputs]
    assert said[4] == "shapes 0" + "".join(f" {' '.join(map(str, place))} |" for place in places)
    free = next((i for i, tensor in enumerate(tensors) if tensor.dtype == T), None)
    taken = [FLOATS if i == free else [only] for i, only in enumerate(types)]
    assert said[5] == "types" + "".join(f" {' '.join(map(str, accepted))} |" for accepted in taken)


@pytest.mark.parametrize("name", BY_NAME)
def test_wrong_sizes_and_ranks_are_logged_and_refused(ask: Path, library: Path, name: str) -> None:
    operator = BY_NAME[name]
    types = [0 if tensor.dtype == T else NATIVE[DataType(tensor.dtype)] for tensor in operator.inputs]
    first = operator.inputs[0]
    fits, clash, unfit, logged, refused = answers(ask, library, operator, types)[6:]
    letter = first.dims[0]
    other = next(tensor.name for tensor in operator.inputs[1:] if letter in tensor.dims)
    assert (fits, unfit) == ("sizes 0", "sizes 1")
    assert clash.startswith(f"logged {name}: input {other}: expected 6 for dimension {letter}, found 5")
    expected = f"expected dimensions {first.dims}, found {len(first.dims) + 1} of them"
    assert logged == f"logged {name}: input {first.name}: {expected}"
    assert refused.startswith("shapes 1")


def test_a_missing_sdk_is_told(headers: Path, tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(tmp_path), f"-DTENSORRT_ROOT={tmp_path / 'absent'}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "set TENSORRT_ROOT to a TensorRT SDK" in " ".join(ran.stderr.split())
