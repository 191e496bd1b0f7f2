"""Open checkpoints of any kind as a ``Checkpoint``: a Hugging Face directory, a .gguf file or a hub id."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dynexport.exporter.checkpoint.adapted import AdaptedCheckpoint
from dynexport.exporter.checkpoint.base import Checkpoint, Importer
from dynexport.exporter.checkpoint.gguf_file import GgufFile
from dynexport.exporter.checkpoint.gguf_header import is_gguf
from dynexport.exporter.checkpoint.hub import download, is_hub_id
from dynexport.exporter.checkpoint.safetensors_directory import SafetensorsDirectory
from dynexport.exporter.checkpoint.tokenizer_files import TokenizerFiles, load_tokenizer, read_tokenizer, turn_ends
from dynexport.exporter.checkpoint.views import text_model
from dynexport.runtime.bundle.checks import checked_kind, checked_path
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import open_plain, read_plain
from dynexport.runtime.bundle.text_files import TOKENIZER_FILE

__all__ = ["Checkpoint", "Importer", "open_checkpoint"]


def open_checkpoint(
    model: str | Path,
    *,
    tokenizer: Path | None = None,
    importer: Importer | None = None,
    adapter: str | Path | None = None,
    importers: Iterable[Importer] = (),
) -> Checkpoint:
    """Open a model; tensors are read later, one at a time.

    Args:
        model: a Hugging Face directory, a GGUF file, or a hub id ``owner/name``, which is downloaded.
        tokenizer: a ``tokenizer.json``, or a directory with a tokenizer, to take instead of the model's own.
        importer: the importer of a directory that other routing code has written; None to look among ``importers``.
        importers: importers of which the first that recognises a directory reads it.
        adapter: a directory of the peft library with a LoRA adapter to merge into the weights; None for none.

    Raises:
        DynexportError: when there is no such model, or the model is damaged or of an unsupported kind.
    """
    checked_kind("model", model, str | Path, "a path or a hub id")
    override = None if tokenizer is None else _read_override(checked_path("tokenizer", tokenizer))
    checkpoint = _open(model, needs_tokenizer=override is None)
    if importer is None and isinstance(checkpoint, SafetensorsDirectory):
        importer = next((known for known in importers if known.recognises(checkpoint)), None)
    if importer is not None:
        checkpoint = _import(checkpoint, importer)
    if adapter is not None:
        checkpoint = AdaptedCheckpoint(checkpoint, checked_path("adapter", adapter))
    if override is not None:
        checkpoint.files |= override.files
        checkpoint.turn_ends = turn_ends(checkpoint.files)
        checkpoint.notes += override.notes
    return checkpoint


def _open(model: str | Path, *, needs_tokenizer: bool) -> Checkpoint:
    source, path = str(model), Path(model)
    try:
        path = path.expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DynexportError(f"{source:.200}: cannot be looked up ({reason}); name a path or a hub id") from error
    if is_directory:
        return text_model(SafetensorsDirectory(path, source, build_tokenizer=needs_tokenizer))
    if is_file and (path.suffix == ".gguf" or is_gguf(path)):
        return GgufFile(path, source, build_tokenizer=needs_tokenizer)
    if path.exists() and not is_file:
        open_plain(path, "a Hugging Face directory or a .gguf file").close()  # says what it is
    if is_file:
        raise DynexportError(
            f"{source}: expected a Hugging Face directory or a GGUF file, found another kind of file; "
            "name the directory that holds config.json"
        )
    if isinstance(model, str) and is_hub_id(model):
        return text_model(SafetensorsDirectory(download(model), source, build_tokenizer=needs_tokenizer))
    raise DynexportError(
        f"{source:.200}: no such file or directory; expected a Hugging Face directory, a .gguf file "
        "or a hub id such as owner/name"
    )


def _import(checkpoint: Checkpoint, importer: Importer) -> Checkpoint:
    if not isinstance(checkpoint, SafetensorsDirectory):
        raise DynexportError(
            f"{checkpoint.source}: import {importer.name}: expected a Hugging Face directory, found a .gguf file; "
            "name the directory that the training has written"
        )
    read = importer.read(checkpoint)
    read.importer = importer.name
    return read


def _read_override(path: Path) -> TokenizerFiles:
    """Return the tokenizer that the user names: an unchanged tokenizer.json, or a directory with its side files."""
    if path.is_dir():
        found = read_tokenizer(path)
        if TOKENIZER_FILE not in found.files:
            raise DynexportError(f"{path}: expected a directory with a tokenizer.json, found none")
        return found
    content = read_plain(path, "a tokenizer", advice="name a tokenizer.json or a directory with one")
    load_tokenizer(content, path)
    return TokenizerFiles({TOKENIZER_FILE: content})
