"""Downloading from the Hugging Face hub, and never anything that could run code."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dynexport.runtime.errors import DynexportError

_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
# Other formats beside the model: subfolders (onnx/, original/) and Mistral's second copy of its weights.
_IGNORED = ["*/*", "consolidated*"]


def is_hub_id(model: str) -> bool:
    """Whether a string has the form ``owner/name``."""
    if model.count("/") != 1 or model.endswith(".gguf"):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def download(model: str) -> Path:
    """Fetch a model into the hub's cache, or find it there.

    Args:
        model: a hub id ``owner/name``.

    Returns:
        The directory of the snapshot.

    Raises:
        DynexportError: when it is not in the cache, and the hub is out of reach, lacks it or refuses it.
    """
    try:
        folder = huggingface_hub.snapshot_download(model, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED)
    except Exception as error:  # whatever the network, the HTTP client or the cache raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DynexportError(
            f"{model}: not a path here, and it could not be downloaded from the Hugging Face hub ({reason}); "
            "check the name, the network and `hf auth login`, or name a local directory"
        ) from error
    return Path(folder)
