"""The runtime: a bundle to an engine, a cache, and text. It needs neither torch nor the exporter."""

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.generate import Generation, Generator, Piece
from dynexport.runtime.sampling import Sampling

__all__ = ["Bundle", "DynexportError", "Generation", "Generator", "Piece", "Sampling"]
