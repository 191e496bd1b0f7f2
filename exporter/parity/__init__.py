"""Parity checks of a bundle, with PyTorch and with itself."""

from dynexport.exporter.parity.report import Check, Departure, Report
from dynexport.exporter.parity.verification import verify

__all__ = ["Check", "Departure", "Report", "verify"]
