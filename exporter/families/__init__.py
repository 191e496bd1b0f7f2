"""The decoder families. Each file of this folder that defines ``FAMILY`` is one; a new family is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.families.class_fields import NEUTRAL, ROTARY
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.per_layer import FIELD, with_own_layers
from dynexport.runtime.bundle.checks import checked_kind
from dynexport.runtime.bundle.errors import DynexportError

__all__ = ["Family", "asked_fields", "families", "find_family", "read_architecture"]


@cache
def families() -> dict[str, Family]:
    """Return all families by ``model_type``, from the modules of this folder."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if isinstance(family, Family):
            found[family.model_type] = family
    return found


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json.

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
    """Return the architecture that a config.json describes.

    Raises:
        DynexportError: when the family is unknown, the value of a field is not supported, or a field is unknown and
            may change the computation. The message names the field and the value.
    """
    return _read(config)[0]


def asked_fields(config: Mapping[str, Any]) -> dict[str, str]:
    """Return how each field of the config's family is used: "read", or "only" and the value that it must have."""
    return _read(config)[1].asked


def _read(config: Mapping[str, Any]) -> tuple[Architecture, Fields]:
    family = find_family(config)
    fields = Fields(family.completed(config), family.model_type)
    fields.asked |= {twin: f"another name of `{name}`" for twin, name in family.twins.items()}
    fields.flag("is_causal")  # refuses null, which transformers takes as false
    for name, value in NEUTRAL.items():
        if name != FIELD or not family.own_layers:
            fields.only(name, value)
    architecture = family.read(fields)
    if architecture.heads % architecture.kv_heads:
        expected = f"a divisor of {architecture.heads} heads"
        raise fields.error("num_key_value_heads", architecture.kv_heads, expected)
    if "layer_types" not in fields.asked:
        kinds = ["sliding_attention" if window else "full_attention" for window in architecture.windows]
        fields.only("layer_types", kinds, "the family's windows are")
    if family.own_layers:
        architecture = with_own_layers(architecture, fields)
    if isinstance(architecture.positions, Rotary):
        fields.asked = dict.fromkeys(ROTARY, "read") | fields.asked
    fields.check_known()
    return architecture, fields
