"""Load the model with transformers' own loader, independent of dynexport's checkpoint reader."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.reference import own_layers, own_models
from dynexport.runtime.bundle.errors import DynexportError

# Fields about the bytes on disk or the routing, not about the float32 model that is built here.
FOREIGN_FIELDS = ("model_type", "dynexport", "dtype", "torch_dtype", "quantization_config", own_layers.FIELD)
# Tensors of the routing contract, in any family; transformers does not know them.
_ROUTING = re.compile(
    r"model\.(layers\.[0-9]+\.mod_(router|mlp_router|predictor|adapter)|radial_router|early_exit_gate)\..+"
)
# Float32 weights up to this size are loaded whole; larger models are loaded one layer at a time.
_RESIDENT_BYTES = 8 << 30


def fits_in_memory(parameters: int) -> bool:
    """Return whether the reference loads a model of this number of parameters whole, as from_pretrained does."""
    return 4 * parameters <= _RESIDENT_BYTES


def reader_reason(checkpoint: Checkpoint) -> str:
    """Return why transformers cannot load a checkpoint by itself; "" if it can."""
    if checkpoint.origin is None:
        return "transformers has no loader for its format"
    if own_layers.own_fields(checkpoint.config):
        return "transformers builds all layers alike"
    if checkpoint.origin.is_dir():
        return ""
    if importlib.util.find_spec("accelerate") is None:
        return "transformers needs accelerate to load a GGUF file: pip install accelerate"
    return ""


def load_pretrained(checkpoint: Checkpoint, max_length: int | None = None) -> Any:
    """Return the model loaded by ``AutoModelForCausalLM.from_pretrained``, in float32 with eager attention.

    No code of a checkpoint is run and no pickle is read.

    Args:
        checkpoint: a directory or GGUF file.
        max_length: the bundle's context, passed to ``set_context``.

    Raises:
        DynexportError: when transformers cannot load it, when a tensor of the model is missing, or when the checkpoint
            has a tensor that belongs neither to the model nor to routing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = checkpoint.origin
    assert path is not None
    try:
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if path.is_file():
            arguments = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            arguments["config"] = gguf_config(checkpoint, path)
        else:
            arguments["config"] = build_config(checkpoint)
        set_context(arguments["config"], max_length)
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                **arguments,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    # transformers raises anything here, from KeyError to the errors of its config validators.
    except Exception as error:
        raise DynexportError(f"{checkpoint.source}: transformers cannot load it: {_line(error)}") from error
    _check(checkpoint.source, type(model).__name__, info)
    return model.eval().requires_grad_(False)


def build_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' config object, read by transformers from a directory, else built from our fields.

    Experts run one after the other, in transformers' plain code.
    """
    from transformers import AutoConfig

    own_models.register(str(checkpoint.config.get("model_type")))
    own = own_layers.own_fields(checkpoint.config)
    if checkpoint.origin is not None and checkpoint.origin.is_dir() and not own:
        config = AutoConfig.from_pretrained(checkpoint.origin, trust_remote_code=False, local_files_only=True)
    else:
        fields = {name: value for name, value in checkpoint.config.items() if name not in FOREIGN_FIELDS}
        config = AutoConfig.for_model(checkpoint.config.get("model_type"), **fields)
    config._experts_implementation = "eager"
    return config


def set_context(config: Any, max_length: int | None) -> None:
    """Make transformers use the rotary frequencies of a bundle with this context.

    transformers uses longrope's long set when the longest row of a batch exceeds the original length. A bundle whose
    context exceeds that length uses the long set for every row, so the long set replaces the short one here.

    Args:
        config: transformers' config object; changed in place, before the model is built.
        max_length: the bundle's context in tokens; None changes nothing.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    changes = max_length is not None and rope.get("rope_type") == "longrope"
    if changes and max_length > rope["original_max_position_embeddings"]:
        rope["short_factor"] = rope["long_factor"]


def gguf_config(checkpoint: Checkpoint, path: Path) -> Any:
    """Return the config of a GGUF file: transformers' reading, completed by ours.

    transformers reads only part of the metadata (not scaled rotary positions, for example) and uses class defaults for
    the rest. A value that differs from the default was read from the file, and takes precedence over ours.
    """
    from transformers import AutoConfig

    ours = build_config(checkpoint)
    with _quiet():
        theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).to_dict()
    defaults = type(ours)().to_dict()
    fields = _taken(ours.to_dict(), theirs, defaults)
    return type(ours)(**{name: value for name, value in fields.items() if name not in FOREIGN_FIELDS})


def _taken(ours: dict[str, Any], theirs: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for name, value in theirs.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(ours.get(name), dict):
            result[name] = _taken(ours[name], value, default or {})
        elif name in ours and value != default:
            result[name] = value
    return result


def _check(source: str, name: str, info: dict[str, Any]) -> None:
    """Raise DynexportError unless the model's tensors and the checkpoint's, without routers, are the same."""
    if missing := sorted(info["missing_keys"]):
        raise DynexportError(
            f"{source}: tensor {missing[0]} is not in the checkpoint, and transformers' {name} needs it: complete the "
            "checkpoint or correct its config.json"
        )
    if unknown := sorted(key for key in info["unexpected_keys"] if not _ROUTING.fullmatch(key)):
        raise DynexportError(
            f"{source}: tensor {unknown[0]}: expected only tensors of transformers' {name} and of routers, found one "
            "that it leaves unread"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the context; ``_check`` covers what they report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the progress bar of GGUF files ignores the setting
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
