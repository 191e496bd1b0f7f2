"""The decoder families. Each file of this folder with a ``FAMILY`` is one; adding one touches nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from dynexport.exporter.architecture import Architecture
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.runtime.checks import checked_kind
from dynexport.runtime.errors import DynexportError

__all__ = ["Family", "families", "find_family", "read_architecture"]


@cache
def families() -> dict[str, Family]:
    """``model_type`` -> family, found by looking into this folder."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if isinstance(family, Family):
            found[family.model_type] = family
    return found


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        DynexportError: when ``model_type`` is missing or not supported.
    """
    checked_kind("config", config, Mapping, "a mapping of config.json's fields")
    model_type = config.get("model_type")
    family = families().get(str(model_type))
    if family is None:
        supported = ", ".join(sorted(families()))
        raise DynexportError(f"config.json: model_type: expected one of {supported}; found {model_type!r}")
    return family


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        DynexportError: naming the field and the value, for an unknown family or an unsupported field of a known one.
    """
    family = find_family(config)
    fields = Fields(config, family.model_type)
    fields.only("is_causal", True)
    architecture = family.read(fields)
    if architecture.heads % architecture.kv_heads:
        expected = f"a divisor of {architecture.heads} heads"
        raise fields.error("num_key_value_heads", architecture.kv_heads, expected)
    return architecture
