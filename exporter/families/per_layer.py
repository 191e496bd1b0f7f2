"""Layers with sizes of their own, as transformers' ``per_layer_config`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dynexport.exporter.families.architecture import Architecture, LayerSizes
from dynexport.exporter.families.fields import Fields

FIELD = "per_layer_config"
_SKIP, _WINDOW = "skip", "sliding_window"
# Field of a layer -> size that it sets.
_SIZES = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "intermediate_size",
}
# What a layer may leave out -> sizes that are 0 then.
_PARTS = {"attention": ("heads", "kv_heads"), "mlp": ("intermediate_size",)}


def with_own_layers(architecture: Architecture, fields: Fields) -> Architecture:
    """Return the architecture with the sizes and windows that ``per_layer_config`` gives to single layers.

    A sub-layer that is left out has no norms either: the hidden states pass it by.

    Raises:
        DynexportError: for a layer that the model does not have, a field that is not supported, or a size out of
            range; it names the layer and the field.
    """
    given = fields.get(FIELD)
    if given is None:
        return architecture
    sizes, windows = [architecture.sizes_of(i) for i in range(architecture.layers)], list(architecture.windows)
    for layer, own in _by_layer(fields, given, architecture.layers).items():
        read = _Layer(fields, layer, own)
        sizes[layer] = read.sizes(sizes[layer])
        windows[layer] = read.window(windows[layer])
    check_some(fields, FIELD, sizes)
    return replace(architecture.with_sizes(sizes), windows=tuple(windows))


def check_some(fields: Fields, name: str, sizes: list[LayerSizes]) -> None:
    """Raise DynexportError, naming a field, for layers of which none has attention, or none an MLP."""
    for part, (size, *_) in _PARTS.items():
        if not any(getattr(own, size) for own in sizes):
            raise fields.error(name, f"none of {len(sizes)}", f"at least one layer with {part}")


def _by_layer(fields: Fields, given: Any, layers: int) -> dict[int, Mapping[str, Any]]:
    """Return the fields of each layer, by its number."""
    if not isinstance(given, Mapping):
        raise fields.error(FIELD, given, "an object of layers")
    found: dict[int, Mapping[str, Any]] = {}
    for key, own in given.items():
        text = str(key)
        layer = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else layers
        if layer >= layers or layer in found:
            raise fields.error(FIELD, key, f"each of the layers 0..{layers - 1} at most once")
        if not isinstance(own, Mapping):
            raise fields.error(f"{FIELD}: layer {layer}", own, "an object of fields")
        found[layer] = own
    return found


class _Layer:
    """The own fields of one layer.

    Raises:
        DynexportError: when a field is not among those that a layer may have, and not equal to the model's.
    """

    def __init__(self, fields: Fields, layer: int, own: Mapping[str, Any]) -> None:
        self._fields, self._own = fields, own
        self._numbers = fields.within(f"{FIELD}: layer {layer}: ", own)
        if "num_attention_heads" in own and fields.get("head_dim") is None:
            raise self._numbers.error(
                "num_attention_heads", own["num_attention_heads"], "a head_dim of the model beside it"
            )
        known = {name for name in (*_SIZES, _WINDOW) if fields.asked.get(name) == "read"} | {_SKIP}
        for name, value in own.items():
            if name not in known and (name not in fields.asked or fields.get(name) != value):
                raise self._numbers.error(name, value, f"no field but {', '.join(sorted(known))}")

    def sizes(self, common: LayerSizes) -> LayerSizes:
        """Return the layer's sizes, given those of the other layers."""
        found = replace(
            common, **{size: self._numbers.integer(name) for name, size in _SIZES.items() if name in self._own}
        )
        skipped = self._own.get(_SKIP, [])
        if not isinstance(skipped, list) or any(part not in _PARTS for part in skipped):
            raise self._numbers.error(_SKIP, skipped, f"a list of {' or '.join(_PARTS)}")
        found = replace(found, **dict.fromkeys((size for part in skipped for size in _PARTS[part]), 0))
        if found.heads and found.heads % found.kv_heads:
            raise self._numbers.error("num_key_value_heads", found.kv_heads, f"a divisor of {found.heads} heads")
        return found

    def window(self, common: int | None) -> int | None:
        """Return the layer's window, given that of the other layers of its kind."""
        if _WINDOW not in self._own:
            return common
        window = None if self._own[_WINDOW] is None else self._numbers.integer(_WINDOW)
        if self._fields.asked.get("layer_types") == "read" and (common is None) != (window is None):
            expected = "no window, as layer_types says" if common is None else "a window, as layer_types says"
            raise self._numbers.error(_WINDOW, window, expected)
        return window


__all__ = ["FIELD", "check_some", "with_own_layers"]
