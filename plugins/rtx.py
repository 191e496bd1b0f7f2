"""Loading TensorRT-RTX so that its parser can take plugins.

The parser looks for ``libtensorrt_rtx.so``, which the wheel has under ``libtensorrt_rtx.so.1`` only; not finding it, it
ends the process at the first plugin. It looks beside itself, so both libraries are loaded from a private directory of
links in which the name exists, before the bindings load them from elsewhere.
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
# Any of them loads the libraries.
_EARLIER = (MODULE, "tensorrt_rtx_bindings", "tensorrt_rtx_libs")
WANTED = "libtensorrt_rtx.so"
_LIBRARIES = (f"{WANTED}.1", "libtensorrt_onnxparser_rtx.so.1")


def load() -> ModuleType:
    """Import ``tensorrt_rtx``, ready for plugins where that is still possible.

    Raises:
        DynexportError: when it is not installed.
    """
    if not _is_loaded() and not _is_found():
        _preload()
    module = require_module(MODULE, "tensorrt-rtx", "build and run engines")
    assert isinstance(module, ModuleType)
    return module


def problem() -> str | None:
    """Why parsing a plugin would end the process, and what to do, in one line; None where it works or is not installed.

    Somebody else's import of ``tensorrt_rtx`` before ``load`` is the reason.
    """
    if not _is_loaded() or _preloaded or _is_found():
        return None
    directory = _wheel()
    return (
        f"{WANTED} is not found beside {_LIBRARIES[1]}, and {MODULE} was imported too early to cure it: import it with "
        f"dynexport.plugins.rtx.load, or make a link of that name to {_LIBRARIES[0]} in {directory}"
    )


def cure_for_others() -> str | None:
    """The command after which programs that do not use ``load`` can parse plugins; None where they can already."""
    return None if _is_found() else f"ln -s {_LIBRARIES[0]} {_wheel()}/{WANTED}"


_preloaded: list[ctypes.CDLL] = []


def _is_loaded() -> bool:
    return any(name in sys.modules for name in _EARLIER)


def _wheel() -> Path | None:
    """Where the wheel keeps its libraries; None where TensorRT-RTX is not a wheel, or not there."""
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
    # The name is looked up at the first plugin, so the directory has to stay.
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    for library in directory.glob("*.so*"):
        (private / library.name).symlink_to(library)
    (private / WANTED).symlink_to(directory / _LIBRARIES[0])
    _preloaded.extend(ctypes.CDLL(str(private / name)) for name in _LIBRARIES)


__all__ = ["cure_for_others", "load", "problem"]
