"""Downloads from the Hugging Face hub; files that could run code are never fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dynexport.exporter.checkpoint.kinds import refuse_quantised
from dynexport.exporter.checkpoint.small_files import parse_object, read_file
from dynexport.exporter.checkpoint.views import plain_config
from dynexport.exporter.families import read_architecture
from dynexport.runtime.bundle.errors import DynexportError

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model"]
# Other formats of the same model: subfolders (onnx/, original/) and Mistral's second copy of the weights.
_IGNORED = ["*/*", "consolidated*"]


def is_hub_id(model: str) -> bool:
    """Return whether a string has the form ``owner/name``."""
    if model.count("/") != 1 or model.endswith(".gguf"):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def download(model: str) -> Path:
    """Download a model into the hub's cache, or find it there; config.json is checked before the weights are fetched.

    Args:
        model: a hub id ``owner/name``.

    Returns:
        The directory of the snapshot.

    Raises:
        DynexportError: when it is not in the cache and cannot be downloaded, or when its family, its quantisation or
            a field of its config.json is not supported.
    """
    with _told(model):
        path = Path(huggingface_hub.hf_hub_download(model, "config.json"))
    config = parse_object(read_file(path), path)
    refuse_quantised(config, model)
    read_architecture(plain_config(config, model))
    with _told(model):
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED))


@contextmanager
def _told(model: str) -> Iterator[None]:
    """Turn any exception of the network, the HTTP client or the cache into a one-line DynexportError."""
    try:
        yield
    except RemoteEntryNotFoundError as error:
        raise DynexportError(
            f"{model}: expected a repository with config.json on the Hugging Face hub, found none in it; download a "
            ".gguf file and name that, merge an adapter into its model, or name another repository"
        ) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DynexportError(
            f"{model}: not a path here, and it could not be downloaded from the Hugging Face hub ({reason}); "
            "check the name, the network and `hf auth login`, or name a local directory"
        ) from error
