"""EXAONE 4: norms only after attention and MLP, norms on q and k, no rotary positions where nothing slides."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    layers, window = fields.layers("num_hidden_layers"), fields.optional_integer("sliding_window")
    sliding = [False] * layers
    if window is not None and fields.get("layer_types") is None:
        every = fields.integer("sliding_window_pattern")
        sliding = [(i + 1) % every != 0 for i in range(layers)]
    else:
        fields.get("sliding_window_pattern")
    windows = layer_windows(fields, window, sliding)
    return llama_like(
        fields,
        qk_norm="head",
        pre_norms=False,
        post_norms=True,
        windows=windows,
        # A model with windows rotates in the layers that have one; a model without windows in all of them.
        rotary_layers=tuple(window is None or slides is not None for slides in windows),
    )


FAMILY = Family("exaone4", "EXAONE 4", "post-norms only, norms on q and k, windows", _read)
