"""Early exit: generated tokens run in the first layers only, then in final norm and head."""

from dynexport.exporter.strategies.early_exit.strategy import STRATEGY

__all__ = ["STRATEGY"]
