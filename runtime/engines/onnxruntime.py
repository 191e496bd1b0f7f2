"""ONNX Runtime: one session per graph, caches bound to the same buffer on both sides so that nothing is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dynexport.runtime.cache import Cache
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph

Array = np.ndarray


class Engine:
    """A session of one graph.

    Args:
        path: the ONNX file, its external data beside it.
        graph: its entry in the manifest.
        threads: intra-op threads; None lets ONNX Runtime take one per physical core.
        profile: prefix of a profile to write, or None.
    """

    def __init__(self, path: Path, graph: Graph, threads: int | None = None, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it has to say comes with its exceptions
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        # Spinning workers of an idle session would take cores from the rest of the process.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise DynexportError(f"{path}: ONNX Runtime refuses the graph: {_one_line(error)}") from error
        self.graph = graph
        self._inputs = {spec.name for spec in graph.inputs}
        found = {node.name for node in self._session.get_inputs()}
        if found != self._inputs:
            raise DynexportError(
                f"{path}: expected the inputs that the manifest names, found {sorted(found ^ self._inputs)[0]!r:.80} "
                "in one of the two only"
            )
        self._bound: tuple[Cache, Any] | None = None

    def run(self, cache: Cache, inputs: dict[str, Array]) -> Array:
        """One step; the cache's buffers are read and written in place.

        Args:
            inputs: arrays by name, as the manifest describes them; those that the graph lacks are left out.

        Returns:
            logits float32 [B, K, vocab].
        """
        try:
            binding = self._binding(cache)
            for name, value in inputs.items():
                if name in self._inputs:
                    binding.bind_cpu_input(name, value)
            binding.bind_output("logits", "cpu")
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise DynexportError(f"{self.graph.file}: ONNX Runtime failed in a step: {_one_line(error)}") from error
        logits: Array = binding.get_outputs()[0].numpy()
        return logits

    def end_profiling(self) -> str:
        """Write the profile; its path."""
        return str(self._session.end_profiling())

    def _binding(self, cache: Cache) -> Any:
        """The caches stay bound from step to step; only a new cache is bound anew."""
        if self._bound is None or self._bound[0] is not cache:
            binding = self._session.io_binding()
            binding.bind_output("logits", "cpu")
            for name, buffer in cache.buffers.items():
                if f"past_key_values.{name}" in self._inputs:
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
                    binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                    binding.bind_ortvalue_output(f"present.{name}", value)
            self._bound = (cache, binding)
        return self._bound[1]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
