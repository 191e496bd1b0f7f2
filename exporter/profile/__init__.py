"""Measure the contribution R(x) of each residual block, for every token of a text (docs/profiling.md).

The import loads neither PyTorch nor matplotlib.
"""

from dynexport.exporter.profile.files import ProfileDirectory
from dynexport.exporter.profile.measurement import Measured, Ratios, measure
from dynexport.exporter.profile.model import Profile, layers_to_skip, summarise

__all__ = ["Measured", "Profile", "ProfileDirectory", "Ratios", "layers_to_skip", "measure", "summarise"]
