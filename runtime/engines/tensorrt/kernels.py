"""Load dynexport's plugins with their CUDA kernels, which are compiled once per user."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.atomic import part_directory, publish
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.plugins import our_plugins
from dynexport.runtime.engines.tensorrt.timing import HOME


def load_with_kernels(trt: Any) -> None:
    """Register dynexport's plugins, with their kernels, in this process.

    Raises:
        DynexportError: when the kernels are not compiled and cannot be compiled; it names the plugins.
    """
    from dynexport.plugins import creators
    from dynexport.plugins.driver import Kernels

    creators.register(trt, Kernels(compiled_kernels()))


def compiled_kernels() -> Path:
    """Return the path of the kernels' fat binary; compile it if it is not cached.

    Raises:
        DynexportError: when nvcc is missing or fails.
    """
    from dynexport.plugins.kernels import SOURCE, compile_kernels

    content = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.iterdir()) if path.is_file())
    path = HOME / f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.fatbin"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A directory, because nvcc replaces its output file and would lose the lock of a part file.
        with part_directory(path.parent) as part:
            publish(compile_kernels(part / path.name), path)
    except OSError as error:
        raise DynexportError(f"{path}: cannot keep the compiled kernels ({error.strerror})") from error
    except DynexportError as error:
        raise DynexportError(
            f"an engine was built with plugins {our_plugins().sha256[:12]}.., here are no kernels for them: {error}; "
            f"or compile them elsewhere (dynexport.plugins.kernels.compile_kernels) and copy the file to {path}"
        ) from error
    return path


__all__ = ["compiled_kernels", "load_with_kernels"]
