"""What the rest uses of the PyTorch golden; importing it does not import PyTorch."""

from dynexport.exporter.reference.hugging_face import BoolArray, Reference, Runs, RunsFor
from dynexport.exporter.reference.unified_skip import unified_skip_runs

__all__ = ["BoolArray", "Reference", "Runs", "RunsFor", "unified_skip_runs"]
