"""Lower the graph's modules to an engine's operators. Each file or folder beside ``target.py`` is one engine's way."""
