"""The installed library: CMake and pkg-config find it, and the minimal samples that are built on it answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bundles import skip_bundle  # noqa: F401 - a fixture
from conftest import BUILD, LIBRARY

from dynexport.runtime import Bundle, Model

SAMPLES = Path(__file__).parents[2] / "samples"
PROMPT = "Hello, World"


def ran(*command: object, **variables: str) -> str:
    """Run a command, which must succeed, and return what it prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library was installed, moved there from elsewhere."""
    home = tmp_path_factory.mktemp("installed")
    ran("cmake", "--install", BUILD, "--prefix", home / "first")
    return Path(shutil.move(home / "first", home / "prefix"))


@pytest.fixture(scope="module", params=["cmake", "pkg-config"])
def programs(request: pytest.FixtureRequest, prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both samples, built on the installed library."""
    built = tmp_path_factory.mktemp("built")
    if request.param == "cmake":
        for name in ("c_minimal", "cpp_minimal"):
            ran("cmake", "-S", SAMPLES / name, "-B", built / name, f"-DCMAKE_PREFIX_PATH={prefix}", *sanitizers())
            ran("cmake", "--build", built / name)
        return {name: built / name / name for name in ("c_minimal", "cpp_minimal")}
    (found,) = prefix.rglob("dynexport.pc")
    flags = ran("pkg-config", "--cflags", "--libs", "dynexport", PKG_CONFIG_PATH=str(found.parent)).split()
    strict = ("-Wall", "-Wextra", "-Werror", "-pedantic")
    ran("cc", "-std=c99", *strict, SAMPLES / "c_minimal" / "main.c", "-o", built / "c_minimal", *flags)
    ran("c++", "-std=c++17", *strict, SAMPLES / "cpp_minimal" / "main.cpp", "-o", built / "cpp_minimal", *flags)
    return {name: built / name for name in ("c_minimal", "cpp_minimal")}


def sanitizers() -> list[str]:
    """Options for CMake that the library was built with."""
    lines = (BUILD / "CMakeCache.txt").read_text().splitlines()
    (value,) = (line.partition("=")[2] for line in lines if line.startswith("DYNEXPORT_SANITIZE:"))
    return [f"-DCMAKE_EXE_LINKER_FLAGS=-fsanitize={value}"] if value else []


def test_answers(programs: dict[str, Path], prefix: Path, skip_bundle: Path) -> None:  # noqa: F811
    (library,) = {path.parent for path in prefix.rglob("libdynexport.so")}
    variables = {"LD_LIBRARY_PATH": str(library), "DYNEXPORT_ONNXRUNTIME": str(LIBRARY)}
    model = Model(Bundle.open(skip_bundle))
    c_answer = ran(programs["c_minimal"], skip_bundle, PROMPT, **variables)
    assert c_answer == model.generate(PROMPT, max_new_tokens=128).text + "\n"
    for depth in ([], ["full"]):
        answer = ran(programs["cpp_minimal"], skip_bundle, PROMPT, *depth, **variables)
        assert answer == model.generate(PROMPT, max_new_tokens=256, depth=depth[0] if depth else None).text + "\n"


def test_errors(programs: dict[str, Path], prefix: Path, tmp_path: Path) -> None:
    (library,) = {path.parent for path in prefix.rglob("libdynexport.so")}
    for program in programs.values():
        command = [str(program), str(tmp_path), PROMPT]
        environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        expected = (
            f"error: {tmp_path}: expected a bundle with a manifest.json, found none; make one with: dynexport convert\n"
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_the_header_is_c(tmp_path: Path, prefix: Path) -> None:
    (tmp_path / "only.c").write_text("#include <dynexport/dynexport.h>\n")
    for command in (("cc", "-std=c99"), ("cc", "-std=c11"), ("c++", "-x", "c++", "-std=c++11")):
        strict = ("-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only")
        ran(*command, *strict, f"-I{prefix / 'include'}", tmp_path / "only.c")
