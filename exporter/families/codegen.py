"""CodeGen: gptj with a fused qkv in the order of the four devices that it was trained on."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture, Array, Source
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.gptj import MASKS, PREFIX, TWINS, gptj_like, turned
from dynexport.exporter.families.sources import Combine

_DEVICES = 4


def _of_devices(combine: Combine) -> Combine:
    """Return a ``combine`` for fused rows [devices, (q, v, k), hidden / devices]."""

    def parts_of(parts: list[Array]) -> Array:
        (fused,) = parts
        rest = fused.shape[1:]
        by_device = fused.reshape(_DEVICES, 3, -1, *rest)
        query, value, key = (by_device[:, part].reshape(-1, *rest) for part in range(3))
        return combine([query, key, value])

    return parts_of


def _read(fields: Fields) -> Architecture:
    combine = _of_devices(turned(fields))
    if fields.integer("n_head") % _DEVICES:
        raise fields.error("n_head", fields.get("n_head"), f"a multiple of {_DEVICES}, as qkv is in {_DEVICES} parts")
    qkv = {
        f"model.layers.{i}.self_attn.qkv_proj.weight": Source((PREFIX.format(i=i) + "attn.qkv_proj.weight",), combine)
        for i in range(fields.layers("n_layer"))
    }
    return gptj_like(fields, qkv)


FAMILY = Family(
    "codegen",
    "CodeGen",
    "gptj with a fused qkv",
    _read,
    base_prefix="transformer.",
    twins=TWINS,
    masks=MASKS,
)
