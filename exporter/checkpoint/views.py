"""Views of a Hugging Face directory: the text part of a multimodal model, and experts in MXFP4 as plain tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.base import Checkpoint
from dynexport.exporter.checkpoint.kinds import MXFP4_FIELD, is_mxfp4
from dynexport.exporter.checkpoint.safetensors_directory import SafetensorsDirectory
from dynexport.runtime.bundle.errors import DynexportError

# model_type of a multimodal model -> that of its text part.
_TEXT_PARTS = {"gemma3": "gemma3_text"}
# Fields of a multimodal config.json that say nothing about its text part.
_OF_IMAGES = (
    "boi_token_index",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "text_config",
    "vision_config",
)
# Beginnings of the names of the text part's tensors, of all versions of transformers -> those of its own model.
_TEXT_NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_IMAGE_NAMES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")
_BLOCKS, _SCALES = "_blocks", "_scales"
# The 16 values of four bits with two of exponent (OCP microscaling formats, MXFP4).
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BLOCK_BYTES, _BIAS = 16, 127


def plain_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the config.json of the text model whose plain weights a view shows.

    Raises:
        DynexportError: when a multimodal config.json has no config of its text part.
    """
    if is_mxfp4(config):
        return {name: value for name, value in config.items() if name != MXFP4_FIELD}
    text = _TEXT_PARTS.get(str(config.get("model_type")))
    if text is None:
        return dict(config)
    inner = config.get("text_config")
    if not isinstance(inner, dict) or inner.get("model_type", text) != text:
        raise DynexportError(f"{source}: text_config: expected the fields of a {text}, found {inner!r:.120}")
    outer = {name: value for name, value in config.items() if name not in _OF_IMAGES}
    return {**outer, **inner, "model_type": text}


def text_model(directory: SafetensorsDirectory) -> Checkpoint:
    """Return the directory, or a view of it as a text model with plain weights; a note says what is left out."""
    if is_mxfp4(directory.config):
        return Mxfp4(directory)
    return TextPart(directory) if str(directory.config.get("model_type")) in _TEXT_PARTS else directory


class _View(Checkpoint):
    """A checkpoint whose tensors are those of a directory."""

    def __init__(self, inner: SafetensorsDirectory) -> None:
        self.source, self.files, self.turn_ends, self.notes = inner.source, inner.files, inner.turn_ends, inner.notes
        self.config = plain_config(inner.config, inner.source)
        self._inner = inner
        self._places = {name: name for name in inner.names}

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DynexportError when there is none of that name."""
        return self._inner.shape(self._places.get(name, name))

    def stored_type(self, name: str) -> str:
        """Name of a tensor's dtype. Raises DynexportError when there is none."""
        return self._inner.stored_type(self._places.get(name, name))

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32; errors as for the directory."""
        return self._inner.read(self._places.get(name, name))

    def read_item(self, name: str, item: int) -> np.ndarray:
        """Return one entry along the first axis of a tensor; errors as for the directory."""
        return self._inner.read_item(self._places.get(name, name), item)


class TextPart(_View):
    """The text part of a multimodal model, under the names of the text model."""

    def __init__(self, inner: SafetensorsDirectory) -> None:
        super().__init__(inner)
        images = [name for name in inner.names if _IMAGE_NAMES.fullmatch(name)]
        self._places = {_text_name(name): name for name in inner.names if name not in set(images)}
        if images:
            self.notes += (
                f"left out: {len(images)} tensors of images ({', '.join(sorted(images)[:2])}, ..), as the text part is "
                "converted",
            )


def _text_name(name: str) -> str:
    for theirs, ours in _TEXT_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


class Mxfp4(_View):
    """A gpt-oss whose experts are pairs of ``_blocks`` and ``_scales``: shown as the float tensors of their values.

    Blocks uint8 [experts, rows, columns / 32, 16] hold two values a byte, the first in its lower half; scales uint8
    [experts, rows, columns / 32] are exponents. The tensor that they stand for is [experts, columns, rows].
    """

    def __init__(self, inner: SafetensorsDirectory) -> None:
        super().__init__(inner)
        self._packed = {name.removesuffix(_BLOCKS) for name in inner.names if name.endswith(_BLOCKS)}
        for name in sorted(self._packed):
            blocks, scales = inner.shape(name + _BLOCKS), inner.shape(name + _SCALES)
            if len(blocks) != 4 or blocks[3] != _BLOCK_BYTES or scales != blocks[:3]:
                raise DynexportError(
                    f"{self.source}: tensor {name}{_BLOCKS}: expected [experts, rows, blocks, {_BLOCK_BYTES}] and "
                    f"scales [experts, rows, blocks], found {list(blocks)} and {list(scales)}"
                )
            del self._places[name + _BLOCKS], self._places[name + _SCALES]
            self._places[name] = name
        self.notes += (
            f"{len(self._packed)} tensors of experts are MXFP4: --precision int8 keeps their values in 2 times the "
            "bytes, fp32 in 8 times; int4 quantises them again",
        )

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return super().shape(name)
        experts, rows, blocks, _ = self._inner.shape(name + _BLOCKS)
        return experts, 2 * _BLOCK_BYTES * blocks, rows

    def stored_type(self, name: str) -> str:
        return "MXFP4" if name in self._packed else super().stored_type(name)

    def read(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return super().read(name)
        return np.stack([self.read_item(name, item) for item in range(self.shape(name)[0])])

    def read_item(self, name: str, item: int) -> np.ndarray:
        if name not in self._packed:
            return super().read_item(name, item)
        packed = self._inner.read_bytes(name + _BLOCKS, item)
        exponents = self._inner.read_bytes(name + _SCALES, item).astype(np.int32) - _BIAS
        values = _VALUES[np.stack([packed & 15, packed >> 4], axis=-1)].reshape(*exponents.shape, -1)
        scaled: np.ndarray = np.ldexp(values, exponents[..., None]).reshape(len(values), -1).T
        return scaled


__all__ = ["Mxfp4", "TextPart", "plain_config", "text_model"]
