"""Where TensorRT plugins come from: a compiled library, or a Python module that registers creators."""

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
        source: the path of a shared library, or the name of a module with ``register(trt)``.
        is_module: which of the two.
        sha256: of the file's content: an engine belongs to exactly these plugins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    is_module: bool
    sha256: str

    @classmethod
    def from_file(cls, path: str | Path) -> PluginLibrary:
        """A compiled library; its path and hash.

        Raises:
            DynexportError: when it cannot be read.
        """
        sha256, _ = hash_plain(Path(path), "a plugin library", advice="compile it first")
        return cls(source=str(Path(path).resolve()), is_module=False, sha256=sha256)

    @classmethod
    def from_module(cls, name: str) -> PluginLibrary:
        """A Python module, such as dynexport.plugins.creators; every file of its package is hashed.

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
        """Whether an ONNX file may call them: ours are called in their own domain only."""
        if self.source != _OURS:
            return True
        import onnx

        return any(opset.domain == DOMAIN for opset in onnx.load(model, load_external_data=False).opset_import)

    def load(self, trt: Any) -> None:
        """Make the plugins known to TensorRT in this process.

        Raises:
            DynexportError: when the library cannot be loaded here.
        """
        try:
            if self.is_module:
                importlib.import_module(self.source).register(trt)
            else:
                # First by itself: the registry says only that it failed, this says which symbol or file is missing.
                ctypes.CDLL(self.source)
                trt.get_plugin_registry().load_library(self.source)
        except Exception as error:
            raise DynexportError(
                f"{self.source}: the plugins cannot be loaded: {' '.join(str(error).split())}"
            ) from error


def our_plugins() -> PluginLibrary:
    """Those of this package, in Python: enough to build with; to run see ``kernels``."""
    return PluginLibrary.from_module(_OURS)
