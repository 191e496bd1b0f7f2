"""What stands beside an engine: what decided it, and what came of building it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynexport.runtime.bundle.manifest import GOLDEN, Bytes, File, Graph, Manifest, Profile
from dynexport.runtime.bundle.text_files import TEXT_FILES
from dynexport.runtime.engines.tensorrt.backend import BackendName

# Of the record, and of how a network is made from a graph: either's change is another engine.
RECORD_VERSION: Literal[1] = 1

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_-]{1,40}$")]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
Words = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GraphHashes(_Part):
    """What a graph is, whatever is built of it.

    Attributes:
        name: in the manifest.
        graph_sha256: of the ONNX file.
        weights_sha256: of the data files of the bundle, names and hashes together.
        interface_sha256: of the graph's entry in the manifest: tensors, shapes, profiles.
    """

    name: Words
    graph_sha256: Sha256
    weights_sha256: Sha256
    interface_sha256: Sha256

    @classmethod
    def of(cls, manifest: Manifest, graph: Graph) -> GraphHashes:
        """A graph of a bundle."""
        # Whatever is no graph and no text may be the external data of a graph.
        others = {*TEXT_FILES, GOLDEN, *(graph.file for graph in manifest.graphs)}
        weights = {name: file.sha256 for name, file in manifest.files.items() if name not in others}
        return cls(
            name=graph.name,
            graph_sha256=manifest.files[graph.file].sha256,
            weights_sha256=digest(weights),
            interface_sha256=digest(graph.model_dump(mode="json")),
        )


class Recipe(_Part):
    """All that decides an engine; another value of any field is another engine.

    Attributes:
        backend_version: the library's, in full.
        compute_capabilities: that it was built for, ascending; none for a portable engine.
        gpu: the only GPU model that it is for; None where the capability decides.
        plugins_sha256: of the plugins that it was built with; None without any.
        stripped: whether it lacks the weights, and takes the bundle's when it is opened.
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
        """Sixteen hexadecimal digits."""
        # Without weights only: engines that were built before there was a choice keep their keys.
        left_out = None if self.stripped else {"stripped"}
        return digest(self.model_dump(mode="json", exclude=left_out))[:16]


class EngineRecord(_Part):
    """One engine.

    Attributes:
        engine: size and hash of the serialized engine.
        profiles: optimization profiles, in the engine's order; their names stand in the graph's entry too.
        cuda: the CUDA version of the driver that it was built under; None without a GPU.
        build_seconds: parsing and building.
        peak_bytes: most memory that the building process held.
    """

    recipe: Recipe
    engine: File
    profiles: tuple[Profile, ...]
    cuda: Words | None
    build_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    peak_bytes: Bytes


def digest(fields: object) -> str:
    """The sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
