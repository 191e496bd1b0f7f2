"""OLMo 3: olmo2 with windows in three of four layers, whose rotary positions are not scaled."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.olmo2 import olmo2_like
from dynexport.exporter.families.rope import RopeDefaults

_THETA = 500000.0
_WINDOWS_IN = 4


def _read(fields: Fields) -> Architecture:
    layers, window = fields.layers("num_hidden_layers"), fields.integer("sliding_window")
    return olmo2_like(
        fields,
        rope=RopeDefaults(theta=_THETA),
        # transformers takes rope_theta for the layers without a window alone.
        sliding_rope=RopeDefaults(theta=_THETA, theta_name=""),
        windows=layer_windows(fields, window, [(i + 1) % _WINDOWS_IN != 0 for i in range(layers)]),
    )


FAMILY = Family("olmo3", "OLMo 3", "post-norms only, norms on whole q and k, windows", _read)
