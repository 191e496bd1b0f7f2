"""How the graph's modules are lowered for an engine. Each file of this folder is one engine's way."""
