"""The record of an engine: the recipe that it was built from, and the result of the build."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynexport.runtime.bundle.manifest import GOLDEN, Bytes, File, Graph, Manifest, Profile
from dynexport.runtime.bundle.text_files import CHECKS_FILE, TEXT_FILES
from dynexport.runtime.engines.tensorrt.backend import BackendName

# Increase it when the record, or the way a network is made from a graph, changes: engines are then rebuilt.
RECORD_VERSION: Literal[1] = 1

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_-]{1,40}$")]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
Words = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GraphHashes(_Part):
    """The identity of a graph.

    Attributes:
        name: name in the manifest.
        graph_sha256: hash of the ONNX file.
        weights_sha256: hash of the names and hashes of the bundle's data files.
        interface_sha256: hash of the graph's entry in the manifest: tensors, shapes, profiles.
    """

    name: Words
    graph_sha256: Sha256
    weights_sha256: Sha256
    interface_sha256: Sha256

    @classmethod
    def of(cls, manifest: Manifest, graph: Graph) -> GraphHashes:
        """Return the hashes of a bundle's graph."""
        # Every file that is neither a graph nor a text file may be external data of a graph.
        others = {*TEXT_FILES, CHECKS_FILE, GOLDEN, *(graph.file for graph in manifest.graphs)}
        weights = {name: file.sha256 for name, file in manifest.files.items() if name not in others}
        return cls(
            name=graph.name,
            graph_sha256=manifest.files[graph.file].sha256,
            weights_sha256=digest(weights),
            interface_sha256=digest(graph.model_dump(mode="json")),
        )


class Recipe(_Part):
    """All inputs that decide an engine; if any field differs, it is another engine.

    Attributes:
        record_version: version of the record's format.
        graph: identity of the graph.
        backend: backend that builds and runs the engine.
        backend_version: full version of the library.
        compute_capabilities: compute capabilities built for, ascending; empty for a portable engine.
        gpu: the only GPU model that can run it; None if the compute capability decides.
        plugins_sha256: hash of the plugins that it was built with; None without plugins.
        stripped: whether the engine lacks weights; opening it takes them from the bundle.
    """

    record_version: Literal[1] = RECORD_VERSION
    graph: GraphHashes
    backend: BackendName
    backend_version: Version
    compute_capabilities: tuple[Capability, ...]
    gpu: Words | None = None
    plugins_sha256: Sha256 | None = None
    stripped: bool = False

    @property
    def key(self) -> str:
        """A hash of the recipe, 16 hexadecimal digits, used in file names."""
        # ``stripped`` counts only if true, so that engines built before the field existed keep their keys.
        left_out = None if self.stripped else {"stripped"}
        return digest(self.model_dump(mode="json", exclude=left_out))[:16]


class EngineRecord(_Part):
    """The record of one engine.

    Attributes:
        recipe: all inputs that decided the engine.
        engine: size and hash of the serialized engine.
        profiles: optimization profiles in the engine's order, as in the graph's entry in the manifest.
        cuda: newest CUDA version that the driver supported at the build; None without a GPU.
        build_seconds: time for parsing and building, in seconds.
        peak_bytes: peak memory of the building process, in bytes.
    """

    recipe: Recipe
    engine: File
    profiles: tuple[Profile, ...]
    cuda: Words | None
    build_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    peak_bytes: Bytes


def digest(fields: object) -> str:
    """Return the sha256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
