"""The package as users install it: its files, its public names, and what works without torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from bundles import CONFORMANCE, Ran, environment
from house import FOLDERS, ROOT, modules, within

import dynexport
from dynexport.exporter.bundle.conversion import convert

PUBLIC = ("dynexport.runtime", "dynexport.exporter")
WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from dynexport.exporter.cli.main import main
main()
"""


def test_every_package_is_found() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {package: folder for folder, package in FOLDERS.items()} == setuptools["package-dir"]
    # Python takes a folder without an __init__.py for a package, too; setup.py would leave it out.
    assert not [module.path for module in modules().values() if not module.path.with_name("__init__.py").is_file()]


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_exist_and_are_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), f"{package}.{name}"


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = importlib.import_module("dynexport.exporter").nonsense


def test_the_runtime_alone_loads_no_torch_and_no_exporter() -> None:
    script = "import sys, dynexport.runtime; print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    loaded = ast.literal_eval(ran.stdout)
    heavy = ("torch", "transformers", "onnx", "onnxscript", "gguf", "rich", "dynexport.exporter")
    assert [name for name in loaded if name.split(".")[0] in heavy or within(name, "dynexport.exporter")] == []


def test_python_m_and_the_version(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dynexport", "--version"]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, f"dynexport, version {dynexport.__version__}\n")
    assert dynexport.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, unpacked: what an ordinary installation has."""
    source, unpacked = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(unpacked), str(source)]
    subprocess.run([sys.executable, "-m", *build], check=True, env=environment())
    (file,) = unpacked.glob("*.whl")
    zipfile.ZipFile(file).extractall(unpacked)
    return unpacked


def test_the_wheel_has_every_file_but_the_c_plus_plus_project(wheel: Path) -> None:
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    apart = ROOT / "runtime" / "cpp"  # built and installed by CMake
    files -= {*(ROOT / "plugins" / "cpu" / "lib").rglob("*")}  # built for this machine, with a wheel of its own
    assert not (wheel / "dynexport" / "runtime" / "cpp").exists()
    for path in (path for path in files if "__pycache__" not in path.parts and not path.is_relative_to(apart)):
        folder, *parts = path.relative_to(ROOT).parts
        assert (wheel / FOLDERS[folder].replace(".", "/") / Path(*parts)).is_file(), path


def without_torch(*arguments: object, wheel: Path | None = None) -> Ran:
    """Run a command in a Python that has neither torch nor transformers, and dynexport from an unpacked wheel."""
    words = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    path = {} if wheel is None else {"PYTHONPATH": str(wheel)}
    ran = subprocess.run(words, capture_output=True, text=True, env=environment(**path), cwd=wheel)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_the_unpacked_wheel_is_what_is_imported(wheel: Path) -> None:
    words = [sys.executable, "-c", "import dynexport.exporter.cli.main as main; print(main.__file__)"]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment(PYTHONPATH=str(wheel)), check=True)
    assert Path(ran.stdout.strip()).is_relative_to(wheel)


def test_convert_and_run_by_the_wheel_without_torch(wheel: Path, tmp_path: Path) -> None:
    converted = without_torch("convert", CONFORMANCE / "skip-2x", "-o", tmp_path / "b", wheel=wheel)
    assert (converted.code, converted.err) == (0, "")
    out = " ".join(converted.out.replace("│", " ").split())
    assert "golden vectors none: " in out and "pip install 'dynexport[torch]'" in out
    run = json.loads((CONFORMANCE / "skip-2x" / "expected.json").read_text())["runs"][1]
    ids = ",".join(map(str, run["prompt"]))
    ran = without_torch("run", tmp_path / "b", "--ids", ids, "--max-new-tokens", 16, "--json", "-", wheel=wheel)
    assert ran.report["ids"] == run["greedy"]


def test_golden_vectors_are_verified_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert convert(CONFORMANCE / "skip-2x", tmp_path / "b").golden > 0
    ran = without_torch("verify", tmp_path / "b", "--json", "-", "--new-tokens", 4)
    assert ran.code == 0, ran.err
    assert ran.report["passed"] is True


def test_what_needs_torch_says_how_to_install_it(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "b", golden=False)
    ran = without_torch("verify", tmp_path / "b", "--against", CONFORMANCE / "skip-2x")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and "pip install 'dynexport[torch]'" in ran.err
    assert len(ran.err.splitlines()) == 1
