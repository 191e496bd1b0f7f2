"""The checks that refuse adapters and quantised checkpoints, which are not the plain weights of a whole model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dynexport.exporter.checkpoint.lora import ADAPTER_FILE
from dynexport.exporter.checkpoint.small_files import find_file, parse_object, read_file
from dynexport.runtime.bundle.errors import DynexportError

# Tensor names of the peft library: low-rank and other adapters, and its wrappers of the layers with adapters.
_ADAPTER_TENSOR = re.compile(
    r"(^|.*\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|ia3_[lbg]+|hada_w[12]_[ab]|base_layer|"
    r"modules_to_save|prompt_embeddings|original_module)(\.|$).*"
)
# Fields of config.json -> the method to name in the message if the field names none.
MXFP4_FIELD = "quantization_config"
_QUANTISED_FIELDS = {
    MXFP4_FIELD: "a method without a name",
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
}
# Endings of tensor names -> the methods that write them, for checkpoints whose config.json does not name one.
_SCALE = r"weight_(packed|scale|shape|zero_point|scale_inv|global_scale)|input_(scale|global_scale)"
_STATE = r"(weight\.)?((nested_)?(absmax|quant_map)|SCB|weight_format|quant_state\..+)"
_QUANTISED_TENSORS = {
    r"qweight|qzeros|g_idx|scales": "gptq or awq",
    _SCALE: "compressed-tensors or fp8",
    _STATE: "bitsandbytes",
    r"W_q|codebooks|codes|weight\._(data|scale|packed|shift)": "hqq, aqlm or quanto",
}


def refuse_adapter(directory: Path) -> None:
    """Raise DynexportError for a directory of the peft library, which holds an adapter and no whole model."""
    path = find_file(directory, ADAPTER_FILE)
    if path is None:
        return
    fields = parse_object(read_file(path), path)
    kind, base = fields.get("peft_type", "adapter"), fields.get("base_model_name_or_path")
    raise DynexportError(
        f"{directory}: expected a whole model, found an adapter ({kind!r:.40}, {ADAPTER_FILE}) of {base!r:.120}; "
        f"convert that model with --adapter {directory}"
    )


def refuse_quantised(config: Mapping[str, Any], source: str) -> None:
    """Raise DynexportError when config.json says that the weights are quantised, but for gpt-oss's MXFP4."""
    for field, unnamed in _QUANTISED_FIELDS.items():
        if (value := config.get(field)) is not None and not (field == MXFP4_FIELD and is_mxfp4(config)):
            raise _quantised(source, _method(value) or unnamed, f"{field} of config.json")


def refuse_foreign_tensors(names: Collection[str], source: str) -> None:
    """Raise DynexportError when a tensor's name is that of an adapter or of a quantised weight."""
    for name in sorted(names):
        if _ADAPTER_TENSOR.fullmatch(name):
            raise DynexportError(
                f"{source}: tensor {name:.120}: expected the weights of a plain model, found an adapter that is not "
                "merged; merge it with peft (merge_and_unload), save the result with save_pretrained, and convert that"
            )
        for pattern, method in _QUANTISED_TENSORS.items():
            if re.fullmatch(rf".+\.({pattern})", name):
                raise _quantised(source, method, f"tensor {name:.120}")


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that experts are stored in MXFP4, as gpt-oss's are."""
    return config.get("model_type") == "gpt_oss" and _method(config.get(MXFP4_FIELD)) == "mxfp4"


def _method(value: Any) -> str | None:
    """Return the name of the method in a quantization_config, or None."""
    if not isinstance(value, Mapping):
        return None
    if value.get("load_in_4bit") or value.get("load_in_8bit"):
        return "bitsandbytes"
    method = value.get("quant_method")
    return None if method is None else f"{method!s:.40}"


def _quantised(source: str, method: str, where: str) -> DynexportError:
    return DynexportError(
        f"{source}: expected weights in float32, float16 or bfloat16, found a checkpoint quantised with {method} "
        f"({where}); convert the model that it was made from, --precision int4 or int8 makes a small bundle of that"
    )
