"""The names and layouts of GGUF tensors, translated to those of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from dynexport.runtime.bundle.errors import DynexportError

OUTER = ("model.embed_tokens", "model.norm", "lm_head")
LAYER = "model.layers.{i}."
# The prefix that the gguf package leaves out of some names.
_BARE = "transformer."
# Rotary tables and scalings: they belong to the config in Hugging Face's format.
_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Bounds the number of names that a hostile file asks for.
_MOST_EXPERTS = 1 << 16
# A tensor of every layer of a mixture of experts, [experts, ..].
EXPERTS = "blk.{i}.ffn_down_exps.weight"


@dataclass(frozen=True)
class Place:
    """The tensors of a file that hold one tensor of the Hugging Face model, in ggml's order of axes reversed.

    Attributes:
        stored: their names; of two, the rows of each matrix are joined.
        item: the entry along their first axis that is meant; None: all of them.
        turns: whether rows of the two take turns, instead of standing one after the other.
        turned: whether Hugging Face holds the matrices transposed.
        lifted: whether Hugging Face holds a vector as a matrix of one row.
    """

    stored: tuple[str, ...]
    item: int | None = None
    turns: bool = False
    turned: bool = False
    lifted: bool = False

    @property
    def is_plain(self) -> bool:
        """Return whether the tensor is one stored tensor as it is, but for the order of its rows."""
        return len(self.stored) == 1 and self.item is None and not self.turned and not self.lifted

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the tensor's shape from those of the stored tensors."""
        first = list(shapes[0] if self.item is None else shapes[0][1:])
        if len(shapes) == 2:
            first[self._rows] = sum(shape[1] for shape in shapes)
        if self.turned:
            first[-2:] = first[:-3:-1]
        return (1, *first) if self.lifted else tuple(first)

    def build(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor from the stored values: whole tensors, or the entry of each that is meant."""
        (found, *others) = parts
        if others:
            axis = self._rows
            if self.turns:
                paired = np.stack(parts, axis=axis + 1)
                found = paired.reshape(*found.shape[:axis], -1, *found.shape[axis + 1 :])
            else:
                found = np.concatenate(parts, axis=axis)
        if self.turned:
            found = found.swapaxes(-1, -2)
        return np.ascontiguousarray(found[None] if self.lifted else found)

    @property
    def _rows(self) -> int:
        return 1 if self.item is None else 0


# The places of a layer's experts, by Hugging Face name, from its number and the number of experts.
PlacesOfExperts = Callable[[int, int], dict[str, Place]]


@dataclass(frozen=True)
class GgufFamily:
    """One ``general.architecture``, or the variant of it that has certain tensors.

    Attributes:
        architecture: its name in GGUF files.
        class_name: the name of the Hugging Face model class.
        modules: the Hugging Face names of a layer's modules.
        outer: those outside of layers.
        layer: the Hugging Face name of a layer, with ``{i}`` for its number.
        permuted: whether rows of q and k are reordered for ggml's interleaved rotary positions.
        shifted_norms: whether norm weights are stored with 1 added.
        ungrouped: whether the fused rows of all query heads stand before those of key and value heads, where Hugging
            Face's key heads follow their query heads.
        model_type: the family of the Hugging Face model; "" for the architecture's name.
        epsilon: the field of config.json with the epsilon of norms; None where it is a constant.
        experts: the places of a layer's experts; None without experts.
        marker: a tensor that only files of this variant have; "" for files without a variant's tensor.
    """

    architecture: str
    class_name: str
    modules: tuple[str, ...]
    outer: tuple[str, ...] = OUTER
    layer: str = LAYER
    permuted: bool = False
    shifted_norms: bool = False
    ungrouped: bool = False
    model_type: str = ""
    epsilon: str | None = "rms_norm_eps"
    experts: PlacesOfExperts | None = None
    marker: str = ""

    def hugging_face_names(self, stored: Mapping[str, tuple[int, ...]], layers: int, path: Path) -> dict[str, Place]:
        """Return the place of every tensor, by Hugging Face name, except rotary tables.

        Args:
            stored: the shapes of the file's tensors, by name.
            layers: the number of layers.
            path: the file, for messages.

        Raises:
            DynexportError: when there is a tensor that this family does not have.
        """
        kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        translate = gguf.get_tensor_name_map(kind, layers).get_name
        inner = (self.layer.format(i=i) + module for i in range(layers) for module in self.modules)
        named: dict[str, Place] = {}
        for module in (*self.outer, *inner):
            translated = translate(module) or translate(module.removeprefix(_BARE))
            for suffix in ("weight", "bias"):
                name = f"{translated}.{suffix}"
                if name in stored:
                    lifted = module.endswith(".shared_expert_gate") and len(stored[name]) == 1
                    named[f"{module}.{suffix}"] = Place((name,), lifted=lifted)
        if self.experts is not None:
            count = self._experts_in(stored, layers, path)
            places = (self.experts(i, count) for i in range(layers))
            named |= {
                name: place for layer in places for name, place in layer.items() if stored.keys() >= {*place.stored}
            }
        used = {name for place in named.values() for name in place.stored}
        unknown = sorted(stored.keys() - used - set(_ROTARY))
        if unknown:
            raise DynexportError(
                f"{path}: tensor {unknown[0]}: expected the tensors of a plain {self.architecture}, found this one; "
                "convert the Hugging Face directory instead"
            )
        return named

    def _experts_in(self, stored: Mapping[str, tuple[int, ...]], layers: int, path: Path) -> int:
        """Return the number of experts, which the tensors of all layers must agree on."""
        name = EXPERTS.format(i=0)
        count = stored[name][0] if name in stored and len(stored[name]) == 3 else 0
        if not 0 < count <= _MOST_EXPERTS // layers:
            raise DynexportError(
                f"{path}: tensor {name}: expected a matrix for each of 1 to {_MOST_EXPERTS // layers} experts, found "
                f"{f'shape {list(stored[name])}' if name in stored else 'none'}"
            )
        for name, shape in stored.items():
            if "_exps." in name and shape[:1] != (count,):
                raise DynexportError(f"{path}: tensor {name}: expected {count} experts, found shape {list(shape)}")
        return count

    def to_hugging_face(self, name: str, values: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
        """Return the values of a tensor in Hugging Face's layout: the inverse of the conversion to GGUF.

        Args:
            name: the Hugging Face name of the tensor.
            values: the stored values, float32.
            heads: the number of query heads.
            kv_heads: the number of key heads.
        """
        if self.shifted_norms and name.endswith("norm.weight"):
            return values - np.float32(1)
        if self.permuted and ".self_attn.q_proj." in name:
            return _deinterleave(values, heads)
        if self.permuted and ".self_attn.k_proj." in name:
            return _deinterleave(values, kv_heads)
        if self.ungrouped and ".query_key_value." in name:
            return _grouped(values, heads, kv_heads)
        return values


def _deinterleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head, from the order (0, half, 1, half + 1, ..) back to (0, 1, .., half, half + 1, ..).

    This is the inverse of ``LlamaModel.permute`` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, *rest = values.shape
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


def _grouped(values: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Return the rows of query, key and value heads with each key head, and its value head, behind its query heads."""
    rows, *rest = values.shape
    size = rows // (heads + 2 * kv_heads)
    queries, keys = values[: heads * size], values[heads * size :].reshape(2, kv_heads, 1, size, *rest)
    groups = [queries.reshape(kv_heads, heads // kv_heads, size, *rest), keys[0], keys[1]]
    return np.concatenate(groups, axis=1).reshape(values.shape)


__all__ = ["EXPERTS", "LAYER", "OUTER", "GgufFamily", "Place", "PlacesOfExperts"]
