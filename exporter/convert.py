"""Temporary alias while the rename settles."""

from dynexport.exporter.conversion import *  # noqa: F403
from dynexport.exporter.conversion import convert  # noqa: F401
