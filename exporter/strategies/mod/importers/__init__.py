"""Importers of checkpoints whose routers other code has written, one file a method; docs/importing.md lists them."""

from dynexport.exporter.strategies.mod.importers.astramind import ASTRAMIND
from dynexport.exporter.strategies.mod.importers.d_llm import D_LLM
from dynexport.exporter.strategies.mod.importers.diffskip import DIFFSKIP
from dynexport.exporter.strategies.mod.importers.dlo import DLO
from dynexport.exporter.strategies.mod.importers.flexidepth import FLEXIDEPTH
from dynexport.exporter.strategies.mod.importers.mindskip import MINDSKIP
from dynexport.exporter.strategies.mod.importers.skipgpt import SKIPGPT

# In the order in which they are asked whether they know a checkpoint: DiffSkip's may look like FlexiDepth's.
IMPORTERS = (ASTRAMIND, DIFFSKIP, FLEXIDEPTH, SKIPGPT, D_LLM, MINDSKIP, DLO)

__all__ = ["IMPORTERS"]
