"""Run bundles. The runtime needs neither torch nor the exporter."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = [
    "Bundle",
    "Conversation",
    "DynexportError",
    "Generation",
    "Generator",
    "Model",
    "Piece",
    "Sampling",
    "Speculation",
    "load",
]

# Imported when asked for: reading a manifest needs no engine.
__getattr__ = lazily(
    __name__,
    {
        "Bundle": "dynexport.runtime.bundle.bundle",
        "DynexportError": "dynexport.runtime.bundle.errors",
        "Conversation": "dynexport.runtime.generation.conversation",
        "Generation": "dynexport.runtime.generation.request",
        "Generator": "dynexport.runtime.generation.generator",
        "Model": "dynexport.runtime.generation.model",
        "Piece": "dynexport.runtime.generation.request",
        "load": "dynexport.runtime.generation.model",
        "Sampling": "dynexport.runtime.generation.sampling",
        "Speculation": "dynexport.runtime.generation.speculation",
    },
)
