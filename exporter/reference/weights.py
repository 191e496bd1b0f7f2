"""A Hugging Face model with weights from a Checkpoint: all at once, or one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference.transformers_layers import DecoderLayers, find_layers
from dynexport.runtime.errors import DynexportError, require_module

# About the bytes on disk or the routing, not about the float32 model that is built here.
_FOREIGN_FIELDS = ("model_type", "dynexport", "dtype", "torch_dtype", "quantization_config")
# Heads that checkpoints store under another name than transformers' module has (gpt_neox).
_RENAMED = {"lm_head.weight": "embed_out.weight"}


class Weights:
    """Brings weights into a model that was built without any.

    Attributes:
        model: a ``transformers`` causal language model in float32 with eager attention; its parameters are on
            the meta device until they are loaded, its buffers are real.
        decoder: how the model calls its decoder layers.
        layers: its decoder layers, in order.
    """

    def __init__(self, checkpoint: Checkpoint, *, streaming: bool) -> None:
        """Load everything, or with ``streaming`` all but the decoder layers.

        Raises:
            DynexportError: when torch or transformers is missing, transformers cannot build the model, or a
                tensor is absent or of another shape.
        """
        self._checkpoint = checkpoint
        self._streaming = streaming
        self.model = _build_model(checkpoint)
        layers_name, self.layers = find_layers(self.model)
        self._layer_names = [f"{layers_name}.{index}." for index in range(len(self.layers))]
        in_layers = layers_name + "."
        self._load([name for name in self._parameter_names() if not (streaming and name.startswith(in_layers))])
        self.model.tie_weights()
        self.decoder = DecoderLayers(self.model)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """The decoder layer with its weights in memory; when streaming they are freed again afterwards."""
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

    def _parameter_names(self) -> list[str]:
        """Names in the model; tied parameters once, under the embedding's name."""
        return [name for name, _ in self.model.named_parameters()]

    def _load(self, names: list[str]) -> None:
        import torch

        for name in names:
            array = self._checkpoint.read(self._stored_name(name))
            expected = tuple(self.model.get_parameter(name).shape)
            if array.shape != expected:
                raise DynexportError(
                    f"{self._checkpoint.source}: tensor {name}: expected shape {expected} from the config, "
                    f"found {array.shape}"
                )
            _set_parameter(self.model, name, torch.from_numpy(array))

    def _stored_name(self, name: str) -> str:
        """The checkpoint's name for a parameter; saved base models, such as gpt2's, leave out the prefix."""
        bare = name.removeprefix(self.model.base_model_prefix + ".")
        for candidate in (name, bare, _RENAMED.get(name)):
            if candidate in self._checkpoint.names:
                return str(candidate)
        raise DynexportError(
            f"{self._checkpoint.source}: tensor {name} is not in the checkpoint, and transformers' "
            f"{type(self.model).__name__} needs it: complete the checkpoint or correct its config.json"
        )


def _build_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model in float32 without weights, by transformers' own classes."""
    require_module("torch", "torch", "run the PyTorch reference")
    require_module("transformers", "torch", "run the PyTorch reference")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in checkpoint.config.items() if name not in _FOREIGN_FIELDS}
    model_type = checkpoint.config.get("model_type")
    try:
        config = AutoConfig.for_model(model_type, **fields)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    # transformers raises anything here, from KeyError to the errors of its config validators.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DynexportError(
            f"{checkpoint.source}: transformers cannot build {model_type!r} from config.json: {reason}"
        ) from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, modules get their parameters on the meta device and their buffers for real.

    ``torch.device("meta")`` would take along the buffers that are computed from the config (rotary
    frequencies, gemma2's embedding scale), and no checkpoint has them.
    """
    from torch import nn

    register = nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        # One that is on meta already stays the same object: so tied parameters stay tied.
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
