"""Load TensorRT-RTX so that its parser can use plugins.

The parser looks for ``libtensorrt_rtx.so``, but the wheel has only ``libtensorrt_rtx.so.1``; without the file, the
parser aborts the process at the first plugin. It looks in its own directory. So both libraries are loaded from a
private directory of links that has the name, before the bindings load them from the wheel.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from dynexport.runtime.bundle.errors import require_module

MODULE = "tensorrt_rtx"
# Importing any of these modules loads the libraries.
_EARLIER = (MODULE, "tensorrt_rtx_bindings", "tensorrt_rtx_libs")
WANTED = "libtensorrt_rtx.so"
_LIBRARIES = (f"{WANTED}.1", "libtensorrt_onnxparser_rtx.so.1")


def load() -> ModuleType:
    """Import and return ``tensorrt_rtx``, ready for plugins unless it was imported before.

    Raises:
        DynexportError: when it is not installed.
    """
    if not _is_loaded() and not _is_found():
        _preload()
    module = require_module(MODULE, "tensorrt-rtx", "build and run engines")
    assert isinstance(module, ModuleType)
    return module


def problem() -> str | None:
    """Return why parsing a plugin would abort the process, and the fix, in one line; None if it works.

    The reason is an import of ``tensorrt_rtx`` before ``load``. None also if TensorRT-RTX is not installed.
    """
    if not _is_loaded() or _preloaded or _is_found():
        return None
    directory = _wheel()
    return (
        f"{WANTED} is not found beside {_LIBRARIES[1]}, and {MODULE} was imported before dynexport could load it: "
        f"import it with dynexport.plugins.rtx.load, or make a link of that name to {_LIBRARIES[0]} in "
        f"{directory}"
    )


def cure_for_others() -> str | None:
    """Return the command that lets programs without ``load`` parse plugins; None if they already can."""
    return None if _is_found() else f"ln -s {_LIBRARIES[0]} {_wheel()}/{WANTED}"


_preloaded: list[ctypes.CDLL] = []


def _is_loaded() -> bool:
    return any(name in sys.modules for name in _EARLIER)


def _wheel() -> Path | None:
    """Return the directory of the wheel's libraries; None if TensorRT-RTX is not installed as a wheel."""
    spec = find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places and (Path(places[0]) / _LIBRARIES[0]).is_file() else None


def _is_found() -> bool:
    directory = _wheel()
    if directory is None or (directory / WANTED).exists():
        return True
    try:
        ctypes.CDLL(WANTED)  # on LD_LIBRARY_PATH
    except OSError:
        return False
    return True


def _preload() -> None:
    directory = _wheel()
    assert directory is not None
    private = Path(tempfile.mkdtemp(prefix="dynexport-"))
    # The parser looks the name up at the first plugin, so the directory is kept until exit.
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    for library in directory.glob("*.so*"):
        (private / library.name).symlink_to(library)
    (private / WANTED).symlink_to(directory / _LIBRARIES[0])
    _preloaded.extend(ctypes.CDLL(str(private / name)) for name in _LIBRARIES)


__all__ = ["cure_for_others", "load", "problem"]
