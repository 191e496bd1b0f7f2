"""The verification ladder: a bundle against PyTorch, and against itself."""

from dynexport.exporter.parity.report import Check, Departure, Report
from dynexport.exporter.parity.verification import verify

__all__ = ["Check", "Departure", "Report", "verify"]
