"""What doctor finds of TensorRT: no GPU, no library, parts that do not fit together; and the timing cache."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import dynexport

from dynexport.plugins import rtx as plain_library
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt import diagnosis, gpu, timing
from dynexport.runtime.engines.tensorrt.backend import Backend, open_backend
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu, find_gpu


class Driver:
    """A CUDA driver with one device, or with an error at one function."""

    def __init__(self, fails: str = "", code: int = 100, devices: int = 1) -> None:
        self.fails, self.code, self.devices = fails, code, devices

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.fails:
                return self.code
            if name == "cuDeviceGetName":
                arguments[0].value = b"Ada card"
            values = {
                "cuDriverGetVersion": 12080,
                "cuDeviceGetCount": self.devices,
                "cuDeviceGetAttribute": {75: 8, 76: 9}.get(arguments[1] if len(arguments) > 1 else 0),
            }
            if name in values:
                arguments[0]._obj.value = values[name]
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"no CUDA-capable device is detected"
            return 0

        return call


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(), Gpu("Ada card", "8.9", "12.8")),
        (Driver("cuInit"), NoGpu("cuInit: CUDA error 100: no CUDA-capable device is detected")),
        (Driver(devices=0), NoGpu("the driver shows no device; see CUDA_VISIBLE_DEVICES")),
        (None, NoGpu("no NVIDIA driver: libcuda.so.1 is not found")),
    ],
)
def test_the_gpu(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, expected: Gpu | NoGpu) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(gpu, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": load}))
    assert find_gpu() == expected


def faults(backend: Backend, found: Gpu | NoGpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(diagnosis, "find_gpu", lambda: found)
    monkeypatch.setattr(diagnosis, "open_backend", lambda name: backend)
    return [finding.found for finding in diagnosis.diagnose() if finding.subject == "tensorrt-rtx" and not finding.good]


@pytest.fixture
def rtx_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    """Installed for CUDA 13, its library with both names."""
    (tmp_path / "libtensorrt_rtx.so.1").touch()
    (tmp_path / "libtensorrt_rtx.so").touch()
    monkeypatch.setattr(plain_library, "_wheel", lambda: tmp_path)
    monkeypatch.setattr(plain_library, "problem", lambda: None)  # tests of others import tensorrt_rtx as they like
    monkeypatch.setattr(diagnosis, "_wheels", lambda name: {"tensorrt_rtx_cu13_libs": "1.7.1.116"})
    return Backend("tensorrt-rtx", None, "1.7.1.116", ("8.0",))


def test_nothing_to_find(rtx_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(rtx_backend, Gpu("Ada card", "8.9", "13.0"), monkeypatch) == []


def test_the_library_without_its_plain_name(
    rtx_backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "libtensorrt_rtx.so").unlink()
    cure = f"ln -s libtensorrt_rtx.so.1 {tmp_path}/libtensorrt_rtx.so"
    (fault,) = faults(rtx_backend, NoGpu("no driver"), monkeypatch)
    assert "its wheel has no libtensorrt_rtx.so, for which the ONNX parser looks" in fault and f"fix: {cure}" in fault
    monkeypatch.setattr(plain_library, "problem", lambda: "it was imported too early")
    assert faults(rtx_backend, NoGpu("no driver"), monkeypatch) == ["it was imported too early"]


def test_parts_of_unlike_versions(rtx_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = Backend("tensorrt-rtx", None, "1.8.0.1", ("8.0",))
    (fault,) = faults(newer, NoGpu("no driver"), monkeypatch)
    assert "expected tensorrt_rtx_cu13_libs 1.8.0.1 as of its module, found 1.7.1.116; pip install" in fault


def test_a_driver_that_is_too_old(rtx_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = faults(rtx_backend, Gpu("Ada card", "8.9", "12.8"), monkeypatch)
    assert fault == "made for CUDA 13, the driver supports 12.8; update the driver"


def test_a_backend_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise RuntimeError('libnvinfer.so.10:\\n not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    with pytest.raises(DynexportError, match=r"tensorrt: installed, but cannot be loaded: libnvinfer.so.10: not found"):
        open_backend("tensorrt")


def test_what_is_installed_here(rtx: Backend) -> None:
    assert set(diagnosis._wheels("tensorrt-rtx").values()) == {rtx.version}
    assert rtx.capabilities[:2] == ("7.5", "8.0") and rtx.capabilities[-1] >= "12.0"


def test_doctor_shows_it() -> None:
    ran = dynexport("doctor", "--json", "-")
    found = {finding["subject"] for finding in ran.report["tensorrt"]}
    assert ran.code == 0 and found == {"GPU", "tensorrt", "tensorrt-rtx", "polygraphy"}


class Config:
    """The part of a builder's configuration that knows timing caches."""

    def __init__(self, readable: bytes = b"") -> None:
        self.readable, self.cache = readable, b""

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: content + b"!") if content in (b"", self.readable) else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return self.cache


def test_timings_are_kept_by_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "HOME", tmp_path / "home")
    path = timing.timing_file("10.13.0.35", "Ada card")
    assert path != timing.timing_file("10.13.0.36", "Ada card") != timing.timing_file("10.13.0.36", "Other card")
    for readable, expected in ((b"", b"!"), (b"!", b"!!"), (b"of another kind", b"!")):
        config = Config(readable)
        timing.use_timings(config, path)
        timing.keep_timings(config, path)
        assert path.read_bytes() == expected
    assert [left.name for left in path.parent.iterdir()] == [path.name]


def test_timings_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    config = Config()
    timing.use_timings(config, tmp_path / "home" / "x.timing")
    timing.keep_timings(config, tmp_path / "home" / "x.timing")
