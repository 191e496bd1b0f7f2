"""The default values of transformers' config classes, from class_defaults.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The value of an absent field, by model_type; a test compares this table with the classes of the installed version.
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
