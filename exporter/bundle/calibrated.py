"""Round a bundle's projections by GPTQ: with the inputs that they have when the PyTorch reference runs a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynexport.exporter.bundle.cache_scales import ScaleText, text_of_windows
from dynexport.exporter.bundle.weights import EMBEDDING, HEAD, LAYERS, WeightReader
from dynexport.exporter.families.architecture import Source
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.layers import stored_weights
from dynexport.exporter.lowering.searched import OfIntegers
from dynexport.exporter.lowering.storage import Array, Split, Storage, StoredWeight
from dynexport.exporter.quantise.feedback import with_feedback
from dynexport.exporter.reference.loading import fits_in_memory
from dynexport.exporter.reference.moments import InputMoments
from dynexport.exporter.reference.oracle import Case
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest

# Most bytes of moments held at a time; the text runs again for those beyond.
_HELD_BYTES = 1 << 29
# Windows that run together.
_ROWS = 4


class Calibrated:
    """Packs 4-bit projections by GPTQ, and other weights as their storage does.

    The inputs of a projection are those of the tokens that the strategy runs there at full depth.

    Attributes:
        projections: the 4-bit weights that PyTorch multiplies by -> their shape, and the values of a block.

    Args:
        reader: the weights of the bundle.
        manifest: the bundle's manifest.
        graphs: the modules of its graphs.
        text: the text that is run.

    Raises:
        DynexportError: for a text shorter than a window, or without torch and transformers.
    """

    def __init__(self, reader: WeightReader, manifest: Manifest, graphs: Sequence[CausalLM], text: ScaleText) -> None:
        windows = text_of_windows(manifest, text.ids)
        self._cases = [Case(tuple(map(int, row)), ((0, len(row)),), manifest.full) for row in windows]
        streaming, context = not fits_in_memory(manifest.model.parameters), manifest.model.max_length
        weights = Weights(reader.checkpoint, streaming=streaming, max_length=context)
        self._model, self._source = weights.model, reader.checkpoint.source
        self._oracle = strategies()[manifest.contract.strategy].oracle(weights, manifest)
        found = {
            name: ((weight.shape[0], weight.shape[1]), weight.storage.block_size)
            for model in graphs
            for name, weight in stored_weights(model)
            if isinstance(weight.storage, OfIntegers)
        }
        self._modules = {name: module for name in found if (module := self._module(reader, name)) is not None}
        self.projections = {name: found[name] for name in self._modules}
        self._moments, self._measured = InputMoments(), frozenset[str]()

    def pack(self, name: str, weight: StoredWeight, matrix: Array) -> dict[str, Array]:
        """Return the values of a weight's parameters."""
        if isinstance(weight.storage, Split):
            return weight.storage.pack_each(matrix, lambda storage, rows: self._packed(name, storage, rows))
        return self._packed(name, weight.storage, matrix)

    def _packed(self, name: str, storage: Storage, rows: Array) -> dict[str, Array]:
        if not isinstance(storage, OfIntegers) or name not in self._modules:
            return storage.pack(rows)
        return storage.packed(with_feedback(rows, self.moments(name, rows.shape[1]), storage.block_size))

    def moments(self, name: str, columns: int) -> Array:
        """Return the sum of x x^T over a projection's inputs x, float32 [columns, columns].

        Raises:
            DynexportError: when the inputs in PyTorch have another number of channels.
        """
        if name not in self._measured:
            self._measure_from(name)
        moments = self._moments.of(name, columns)
        if len(moments) != columns:
            raise DynexportError(
                f"{self._source}: {name}: expected inputs of {columns} channels in the PyTorch reference, "
                f"found {len(moments)}; choose --quantiser search"
            )
        return moments

    def _module(self, reader: WeightReader, name: str) -> Any:
        """Return the PyTorch module that multiplies by a weight; None for a table that nothing multiplies by."""
        if name == HEAD or (name == EMBEDDING and reader.architecture.tied_embeddings):
            return self._model.get_output_embeddings()
        if not name.startswith(LAYERS):
            return None
        first = reader.architecture.sources.get(name, Source((name,))).names[0]
        return self._model.get_submodule(first.removesuffix(".weight"))

    def _measure_from(self, name: str) -> None:
        """Measure the moments for a weight, and for those that follow as far as memory allows."""
        names = list(self._modules)
        group, held = [name], self.projections[name][0][1] ** 2
        for following in names[names.index(name) + 1 :]:
            held += self.projections[following][0][1] ** 2
            if 4 * held > _HELD_BYTES:
                break
            group.append(following)
        self._moments, self._measured = InputMoments(), frozenset(group)
        with self._moments.recorded({part: self._modules[part] for part in group}):
            for start in range(0, len(self._cases), _ROWS):
                self._oracle.answers(self._cases[start : start + _ROWS])
