"""The fields of a PEFT adapter's config that its tensors are merged by, and the arithmetic of merging."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.small_files import find_file, parse_object, read_file
from dynexport.runtime.bundle.checks import is_integer, is_number, shown
from dynexport.runtime.bundle.errors import DynexportError

ADAPTER_FILE = "adapter_config.json"
_LARGEST_RANK = 1 << 16
_MOST_PATTERNS, _LONGEST_PATTERN = 4096, 200
# Fields that change which weights are trained or how, but not what a trained tensor means.
_OF_TRAINING = frozenset(
    {
        "adapter_name",
        "alpha_pattern",
        "auto_mapping",
        "base_model_class",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "loraplus_lr_ratio",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "parent_library",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# Ways to begin that leave the base's weights as they are. Others, such as pissa, train on a changed base.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# Patterns of peft: names of modules, with dots and numbers, are all that is matched here.
_PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter, which say how its tensors change the weights of its base.

    Attributes:
        base: the name of the base that it was trained for; "" if it names none.
        ranks: rank by the end of a module's name, for modules with a rank of their own.
        alphas: likewise for alpha.
        rank: the rank of all other modules.
        alpha: the alpha of all other modules.
        root: whether the product is scaled by alpha / sqrt(rank) in place of alpha / rank.
        magnitudes: whether rows have trained lengths (DoRA).
        turned: whether square matrices are stored with a column per output, as gpt2's are; other shapes tell it.
    """

    base: str
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank: int
    alpha: float
    root: bool
    magnitudes: bool
    turned: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, by its name in the base."""
        return int(_matched(self.ranks, module, self.rank))

    def scale(self, module: str) -> float:
        """Return the factor of a module's product."""
        rank = self.rank_of(module)
        return float(_matched(self.alphas, module, self.alpha)) / (math.sqrt(rank) if self.root else rank)


def read_lora_config(directory: Path) -> LoraConfig:
    """Return the config of an adapter's directory.

    Raises:
        DynexportError: when there is none, for another kind of adapter than LoRA, or for a field that changes the
            meaning of its tensors and is not supported.
    """
    path = find_file(directory, ADAPTER_FILE)
    if path is None:
        raise DynexportError(f"{directory}: adapter: expected {ADAPTER_FILE} of the peft library, found none")
    fields = parse_object(read_file(path), path)
    if fields.get("peft_type") != "LORA":
        raise DynexportError(f"{path}: peft_type: expected LORA, found {shown(fields.get('peft_type'))}")
    for name, value in fields.items():
        if name not in _OF_TRAINING and value not in (None, False, [], {}):
            raise _unsupported(path, name, value)
    beginning = fields.get("init_lora_weights", True)
    if not any(beginning is known or (isinstance(known, str) and beginning == known) for known in _BEGINNINGS):
        raise DynexportError(
            f"{path}: init_lora_weights: expected an adapter of the base's own weights, found {shown(beginning)}, "
            "which changes them; save it again with path_initial_model_for_weight_conversion"
        )
    return LoraConfig(
        base=str(fields.get("base_model_name_or_path") or ""),
        ranks=_patterns(path, fields, "rank_pattern", _rank),
        alphas=_patterns(path, fields, "alpha_pattern", _alpha),
        rank=_rank(path, "r", fields.get("r", 8)),
        alpha=_alpha(path, "lora_alpha", fields.get("lora_alpha", 8)),
        root=_flag(path, fields, "use_rslora"),
        magnitudes=_flag(path, fields, "use_dora"),
        turned=_flag(path, fields, "fan_in_fan_out"),
    )


def merged(
    weight: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Return a matrix with an adapter's product added.

    Args:
        weight: float32 [N, K], a row per output.
        down: float32 [rank, K].
        up: float32 [N, rank].
        scale: the product's factor.
        lengths: float32 [N], the lengths that rows get (DoRA); None leaves them.

    Returns:
        float32 [N, K].
    """
    total: np.ndarray = weight + (up @ down) * np.float32(scale)
    if lengths is not None:
        total *= (lengths / np.linalg.norm(total, axis=1))[:, None]
    return np.asarray(total, np.float32)


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of a module's name, at a dot; else the default."""
    return next((value for end, value in patterns.items() if f".{module}".endswith(f".{end}")), default)


def _patterns(path: Path, fields: Mapping[str, Any], name: str, checked: Any) -> dict[str, Any]:
    found = fields.get(name) or {}
    if not isinstance(found, dict) or len(found) > _MOST_PATTERNS:
        raise DynexportError(
            f"{path}: {name}: expected an object of up to {_MOST_PATTERNS} modules, found another value"
        )
    for end, value in found.items():
        if len(end) > _LONGEST_PATTERN or not _PLAIN.fullmatch(end):
            raise DynexportError(f"{path}: {name}: expected names of modules, found the pattern {end!r:.80}")
        checked(path, name, value)
    return found


def _rank(path: Path, name: str, value: Any) -> int:
    if not is_integer(value) or not 1 <= value <= _LARGEST_RANK:
        raise DynexportError(f"{path}: {name}: expected a rank of 1..{_LARGEST_RANK}, found {shown(value)}")
    return int(value)


def _alpha(path: Path, name: str, value: Any) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise DynexportError(f"{path}: {name}: expected a finite number, found {shown(value)}")
    return float(value)


def _flag(path: Path, fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if value not in (True, False, None):
        raise DynexportError(f"{path}: {name}: expected true or false, found {shown(value)}")
    return bool(value)


def _unsupported(path: Path, name: str, value: Any) -> DynexportError:
    return DynexportError(
        f"{path}: {name:.80}: expected a plain LoRA adapter, without this field, found {shown(value)}; merge it "
        "with peft (merge_and_unload), save the result with save_pretrained, and convert that"
    )


__all__ = ["ADAPTER_FILE", "LoraConfig", "merged", "read_lora_config"]
