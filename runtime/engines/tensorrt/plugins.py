"""Load TensorRT plugins from a compiled library, or from a Python module that registers creators."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dynexport.plugins.schema import DOMAIN
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import hash_plain

_OURS = "dynexport.plugins.creators"


class PluginLibrary(BaseModel):
    """Plugins that an engine is built and run with. Make one with ``from_file`` or ``from_module``.

    Attributes:
        source: path of a shared library, or name of a Python module with a function ``register(trt)``.
        is_module: whether ``source`` is a module.
        sha256: hash of the files; an engine works only with the plugins that it was built with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    is_module: bool
    sha256: str

    @classmethod
    def from_file(cls, path: str | Path) -> PluginLibrary:
        """Return the plugins of a compiled library.

        Raises:
            DynexportError: when it cannot be read.
        """
        sha256, _ = hash_plain(Path(path), "a plugin library", advice="compile it first")
        return cls(source=str(Path(path).resolve()), is_module=False, sha256=sha256)

    @classmethod
    def from_module(cls, name: str) -> PluginLibrary:
        """Return the plugins of a Python module, such as dynexport.plugins.creators; its whole package is hashed.

        Raises:
            DynexportError: when there is no such module.
        """
        try:
            spec = importlib.util.find_spec(name)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            raise DynexportError(f"{name}: expected a Python module with TensorRT plugins, found none of that name")
        within = [Path(spec.origin).parent] if "." in name else []
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()] or within
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
        content = hashlib.sha256()
        for path in filter(Path.is_file, files or [Path(spec.origin)]):
            content.update(path.read_bytes())
        return cls(source=name, is_module=True, sha256=content.hexdigest())

    def serve(self, model: Path) -> bool:
        """Return whether an ONNX file may call the plugins; dynexport's are called only in its own operator domain."""
        if self.source != _OURS:
            return True
        import onnx

        return any(opset.domain == DOMAIN for opset in onnx.load(model, load_external_data=False).opset_import)

    def load(self, trt: Any) -> None:
        """Register the plugins in this process.

        Raises:
            DynexportError: when the library cannot be loaded here.
        """
        try:
            if self.is_module:
                importlib.import_module(self.source).register(trt)
            else:
                # Loaded first by ctypes, whose error names the missing symbol or file; the registry's does not.
                ctypes.CDLL(self.source)
                trt.get_plugin_registry().load_library(self.source)
        except Exception as error:
            raise DynexportError(
                f"{self.source}: the plugins cannot be loaded: {' '.join(str(error).split())}"
            ) from error


def our_plugins() -> PluginLibrary:
    """Return dynexport's Python plugins; they suffice to build an engine. To run one, see ``kernels``."""
    return PluginLibrary.from_module(_OURS)
