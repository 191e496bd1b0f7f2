"""Which decoder a bundle needs, and what all of them do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import Manifest, Speedup
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.cache import Cache, Entries
from dynexport.runtime.execution.decoder import Decoder, Tokens
from dynexport.runtime.execution.path_cache import PathCache
from dynexport.runtime.execution.path_decoder import PathDecoder
from dynexport.runtime.execution.single_path_decoder import SinglePathDecoder

Array = np.ndarray
AnyCache: TypeAlias = Cache | PathCache


class AnyDecoder(Protocol):
    """Prompts and steps over a cache of the decoder's own kind; arguments and errors as for ``Decoder``."""

    bundle: Bundle
    manifest: Manifest
    backend: RunBackend
    threads: int | None

    def cache(self, rows: int, slots: int, *, record: bool = False, room: int | None = None) -> Any:
        """Room for ``rows`` sequences of ``slots`` tokens."""

    def check_cache(self, cache: Entries) -> None:
        """Raise DynexportError for a cache that is not one of its own."""

    def prefill(
        self,
        cache: Any,
        prompts: Sequence[Tokens],
        *,
        chunk: int = ...,
        all_logits: bool = ...,
        logits_at: Sequence[Array] | None = ...,
        forced: Sequence[Array] | None = ...,
    ) -> list[Array]:
        """Run one prompt per row on top of what the cache holds."""

    def step(
        self, cache: Any, tokens: Tokens, speedup: Speedup, live: Array | None = None, *, forced: Array | None = ...
    ) -> Array:
        """Feed one generated token per row."""

    def end_profiling(self) -> list[Path]:
        """The profiles of all sessions, written now."""


def open_decoder(
    bundle: Bundle,
    threads: int | None = None,
    *,
    backend: RunBackend = "onnxruntime",
    profile: Path | None = None,
) -> AnyDecoder:
    """The bundle's graphs, loaded; arguments and errors as for the decoders themselves."""
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    kind: type[Decoder] | type[PathDecoder] = Decoder
    if bundle.manifest.single_graph is not None:
        kind = SinglePathDecoder
    elif isinstance(bundle.manifest.contract, Radial):
        kind = PathDecoder
    return kind(bundle, threads, backend=backend, profile=profile)


__all__ = ["AnyCache", "AnyDecoder", "open_decoder"]
