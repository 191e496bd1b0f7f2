"""Load a Checkpoint's weights into a transformers model: all at once, or one decoder layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference import own_layers
from dynexport.exporter.reference.dequantised import DequantisedWeights
from dynexport.exporter.reference.experts import read_of_experts
from dynexport.exporter.reference.half_weights import HalfWeights
from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.loading import build_config, load_pretrained, reader_reason, set_context
from dynexport.exporter.reference.seen_entries import SeenEntries
from dynexport.exporter.reference.stored import StoredTensors, Tensors
from dynexport.exporter.reference.transformers_layers import DecoderLayers, find_layers
from dynexport.runtime.bundle.errors import DynexportError, require_module

# Heads that checkpoints store under another name than transformers' module has (gpt_neox).
_RENAMED = {"lm_head.weight": "embed_out.weight"}


class Weights:
    """A transformers model together with its weights.

    Attributes:
        model: a ``transformers`` causal language model in float32 with eager attention; its parameters are on
            the meta device until they are loaded, its buffers have values.
        decoder: how the model calls its decoder layers.
        layers: its decoder layers, in order.
        tensors: the checkpoint's tensors by name, router tensors included.
        source: the path or name that the user gave, for messages.
        loaded_by: the loader that read the checkpoint, for reports.
    """

    def __init__(self, checkpoint: Checkpoint, *, streaming: bool, max_length: int | None = None) -> None:
        """Load the weights, with transformers' own loader where it can.

        Args:
            checkpoint: the checkpoint to load.
            streaming: load the decoder layers later, one at a time.
            max_length: context of the bundle under test, which changes longrope's frequencies; None: the model's own.

        Raises:
            DynexportError: when torch or transformers is missing, transformers cannot build the model, or a
                tensor is absent or of another shape.
        """
        require_module("torch", "torch", "run the PyTorch reference")
        require_module("transformers", "torch", "run the PyTorch reference")
        self.source = checkpoint.source
        self._streaming = streaming
        self._stored: DequantisedWeights | HalfWeights | None = None
        self._entries: SeenEntries | None = None
        reason = reader_reason(checkpoint)
        directory = checkpoint.origin if checkpoint.origin is not None and checkpoint.origin.is_dir() else None
        self.tensors: Tensors = checkpoint if directory is None else StoredTensors(directory, checkpoint.source)
        model = None
        if not streaming and not reason:
            try:
                model = load_pretrained(checkpoint, max_length)
            except DynexportError as error:
                if directory is not None:
                    raise
                reason = str(error).removeprefix(f"{checkpoint.source}: ")  # a GGUF file unknown to it
        if model is not None:
            self.model = model
            self.loaded_by = "transformers (from_pretrained)"
        else:
            self.model = _build_model(checkpoint, max_length)
            self._load_parameters()
            self.loaded_by = _own_loading(directory is not None, streaming, reason)
        self._find_layers()

    def rounded(self, stored: DequantisedWeights | HalfWeights) -> Weights:
        """Return a copy of the model that computes with a bundle's rounded matrices."""
        other = copy.copy(self)
        other._stored = stored
        other.model = copy.deepcopy(self.model)
        for name, parameter in other.model.named_parameters():
            if not parameter.is_meta:  # streamed layers are replaced when they are loaded
                parameter.data.copy_(other.as_stored(name, parameter.numpy()))
        other._find_layers()
        return other

    def with_entries(self, entries: SeenEntries) -> Weights:
        """Return the same model, whose tokens attend to the keys and values that ``entries`` shows them."""
        other = copy.copy(self)
        other._entries = entries
        return other

    def run(self, layer: Any, call: Call, row: int, tokens: Any, place: int | None = None) -> Any:
        """Run a layer with transformers' code on tokens of a row.

        Args:
            layer: the layer.
            call: its arguments for these tokens.
            row: number of the row.
            tokens: int64 [n], their positions in the row.
            place: place of its keys and values in ``with_entries``; None if it is the layer's number.

        Returns:
            Hidden states [1, n, hidden].
        """
        shown = call if self._entries is None else self._entries.shown(self.decoder, call, row, tokens, place)
        return self.decoder.run(layer, shown)

    def _find_layers(self) -> None:
        names, self.layers = find_layers(self.model)
        self._layer_names = [f"{name}." for name in names]
        self.decoder = DecoderLayers(self.model)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Yield a decoder layer with its weights in memory; with ``streaming``, free them afterwards."""
        if not self._streaming:
            yield self.layers[index]
            return
        names = [name for name in self._parameter_names() if name.startswith(self._layer_names[index])]
        self._load(names)
        try:
            yield self.layers[index]
        finally:
            for name in names:
                _set_parameter(self.model, name, self.model.get_parameter(name).to("meta"))

    def _load_parameters(self) -> None:
        """Load all parameters; with ``streaming``, those of decoder layers are left out."""
        in_layers = tuple(f"{name}." for name in find_layers(self.model)[0])
        self._load([name for name in self._parameter_names() if not (self._streaming and name.startswith(in_layers))])
        self.model.tie_weights()
        self._untie()

    def as_stored(self, name: str, array: np.ndarray) -> Any:
        """Return a parameter as a tensor: the checkpoint's values, or a bundle's quantised ones."""
        import torch

        return torch.from_numpy(array if self._stored is None else self._stored.stored(self._numbered(name), array))

    def _numbered(self, name: str) -> str:
        """Return a parameter's name with its layer's number in the model, where layers stand in several lists."""
        for index, layer in enumerate(find_layers(self.model)[0]):
            if name.startswith(f"{layer}."):
                return f"layers.{index}.{name.removeprefix(f'{layer}.')}"
        return name

    def _untie(self) -> None:
        """Untie the head if the checkpoint stores another matrix for it than the embedding's, like transformers."""
        import torch

        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head.weight is not embedding.weight:
            return
        name = next(name for name, module in self.model.named_modules() if module is head) + ".weight"
        stored = next((known for known in (name, _RENAMED.get(name)) if known in self.tensors.names), None)
        if stored is None:
            return
        matrix = self.tensors.read(stored)
        if not np.array_equal(matrix, self.tensors.read(self._stored_name(self._embedding_name()))):
            _set_parameter(self.model, name, torch.from_numpy(matrix))

    def _embedding_name(self) -> str:
        embedding = self.model.get_input_embeddings().weight
        return next(str(name) for name, parameter in self.model.named_parameters() if parameter is embedding)

    def _parameter_names(self) -> list[str]:
        """Return the model's parameter names; tied parameters appear once, under the embedding's name."""
        return [name for name, _ in self.model.named_parameters()]

    def _load(self, names: list[str]) -> None:
        config = self.model.config
        experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)
        for name in names:
            array = None if name in self.tensors.names else self._of_experts(name, experts)
            array = self.tensors.read(self._stored_name(name)) if array is None else array
            expected = tuple(self.model.get_parameter(name).shape)
            if array.shape != expected:
                raise DynexportError(
                    f"{self.source}: tensor {name}: expected shape {expected} from the config, found {array.shape}"
                )
            _set_parameter(self.model, name, self.as_stored(name, array))

    def _of_experts(self, name: str, experts: int) -> np.ndarray | None:
        bare = name.removeprefix(self.model.base_model_prefix + ".")
        found = (read_of_experts(self.tensors, each, experts) for each in dict.fromkeys((name, bare)))
        return next((array for array in found if array is not None), None)

    def _stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a parameter; saved base models, such as gpt2's, omit the prefix."""
        bare = name.removeprefix(self.model.base_model_prefix + ".")
        candidates = [name, bare, _RENAMED.get(name)]
        if self.model.get_parameter(name) is self.model.get_output_embeddings().weight:
            candidates.append("lm_head.weight")  # a tied pair, stored under the head's name
        for candidate in candidates:
            if candidate in self.tensors.names:
                return str(candidate)
        raise DynexportError(
            f"{self.source}: tensor {name} is not in the checkpoint, and transformers' "
            f"{type(self.model).__name__} needs it: complete the checkpoint or correct its config.json"
        )


def _own_loading(directory: bool, streaming: bool, reason: str) -> str:
    """Return how the checkpoint was read without from_pretrained, and why, for reports."""
    part = "one layer at a time" if streaming else "whole"
    if directory:
        return f"safetensors, {part}, into transformers' modules"
    why = reason or "transformers would load a GGUF file whole"
    return f"dynexport's own reader, whose faults it cannot show ({why})"


def _build_model(checkpoint: Checkpoint, max_length: int | None) -> Any:
    """Build the checkpoint's model in float32 without weights, from transformers' own classes."""
    import torch
    from transformers import AutoModelForCausalLM

    model_type = checkpoint.config.get("model_type")
    try:
        config = build_config(checkpoint)
        set_context(config, max_length)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
            own_layers.replace_layers(model, own_layers.own_fields(checkpoint.config))
    # transformers raises anything here, from KeyError to the errors of its config validators.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DynexportError(
            f"{checkpoint.source}: transformers cannot build {model_type!r} from config.json: {reason}"
        ) from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device, and buffers with values, inside the context.

    ``torch.device("meta")`` would also move the buffers that are computed from the config (rotary frequencies, gemma2's
    embedding scale) and that no checkpoint stores.
    """
    from torch import nn

    register = nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        # A parameter on meta stays the same object, so that tied parameters stay tied.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _set_parameter(model: Any, name: str, tensor: Any) -> None:
    from torch import nn

    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
