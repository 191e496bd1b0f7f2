"""Rotary positions of a config.json: the frequencies and the attention factor that transformers computes from it.

The formulas, and the order in which field names are tried, are those of transformers 5 (``modeling_rope_utils.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynexport.exporter.families.architecture import LongContext, Rotary
from dynexport.exporter.families.fields import Fields
from dynexport.runtime.bundle.errors import DynexportError

_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_FIELDS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    # A mark of early yarn models, which no implementation reads.
    "finetuned",
    # How vision models divide channels among three positions; in text the three are equal.
    "mrope_section",
)


_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class RopeDefaults:
    """A family's defaults for rotary positions, and its names of the fields.

    Attributes:
        theta: the default base of the frequencies.
        theta_name: the field of the base outside ``rope_parameters``.
        share: the default share of a head's channels that is rotated; None: the family always rotates all channels.
        share_name: the field of the share outside ``rope_parameters``.
        types: name in the config -> rope type, for the types that the family supports.
        values: the object of a config without one.
    """

    theta: float = 10000.0
    theta_name: str = "rope_theta"
    share: float | None = None
    share_name: str = "partial_rotary_factor"
    types: Mapping[str, str] = field(default_factory=lambda: {name: name for name in _TYPES})
    values: Mapping[str, Any] = field(default_factory=dict)


class _Rope:
    """The fields of ``rope_scaling`` where it is given, else of ``rope_parameters``, as in transformers."""

    def __init__(self, config: Fields, absent: Mapping[str, Any]) -> None:
        self.config = config
        self.name = "rope_scaling" if config.get("rope_scaling", {}) != {} else "rope_parameters"
        values = config.get(self.name, dict(absent))
        if not isinstance(values, dict):
            raise config.error(self.name, values, "an object")
        for key, value in values.items():
            if isinstance(value, dict):
                raise self.error(key, value, "the same fields for all layers, not an object for each type of layer")
            if key not in _FIELDS and value is not None:
                raise self.error(key, value, f"one of the fields {', '.join(_FIELDS)}")
        self._values = values
        self._numbers = Fields({self._full(key): value for key, value in values.items()}, config.family)

    def _full(self, key: str) -> str:
        return f"{self.name}.{key}"

    def error(self, key: str, value: Any, expected: str) -> DynexportError:
        """Return an error that names the field, the expected and the found value."""
        return self.config.error(self._full(f"{key:.80}"), value, expected)

    def kind(self, types: Mapping[str, str]) -> str:
        """Return the rope type; ``type`` is the older name of ``rope_type``."""
        key = "rope_type" if "rope_type" in self._values or "type" not in self._values else "type"
        value = self._values.get(key, "default")
        if not isinstance(value, str) or value not in types:
            raise self.error(key, value, f"one of {', '.join(types)}")
        return types[value]

    def get(self, key: str) -> Any:
        """Return the unchecked value, or None."""
        return self._values.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number; ``default`` if it is absent, an error if it is null."""
        return self._numbers.number(self._full(key), default)

    def optional(self, key: str) -> float | None:
        """Return a positive number, or None if it is absent or null."""
        return None if self.get(key) is None else self.number(key)

    def or_zero(self, key: str) -> float | None:
        """Return a positive number, or None if it is absent, null or 0, as transformers tests its truth."""
        value = self.get(key)
        return None if value == 0 and not isinstance(value, bool) else self.optional(key)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean; null counts as false, as in transformers."""
        value = self._values.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return bool(value)

    def factors(self, key: str, count: int) -> list[float]:
        """Return a list of ``count`` positive numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, value, f"{count} numbers, one for every two rotated channels")
        numbers = Fields({f"{self._full(key)}[{i}]": item for i, item in enumerate(value)}, self.config.family)
        return [numbers.number(f"{self._full(key)}[{i}]") for i in range(count)]


@dataclass(frozen=True)
class _Sizes:
    """The sizes that every rope type needs.

    Attributes:
        base: theta.
        dim: the number of rotated channels per head.
        max_length: ``max_position_embeddings``, in tokens.
        original: the original training length, in tokens.
    """

    base: float
    dim: int
    max_length: int
    original: int

    def plain(self) -> list[float]:
        """Return the inverse frequencies without scaling: theta ** (-i / dim) for every second channel i."""
        return [self.base ** (-i / self.dim) for i in range(0, self.dim, 2)]


def read_rotary(fields: Fields, head_dim: int, max_length: int, defaults: RopeDefaults | None = None) -> Rotary:
    """Return the rotary positions that a config describes.

    Args:
        fields: the fields of config.json.
        head_dim: channels of a head.
        max_length: ``max_position_embeddings``, in tokens.
        defaults: the family's defaults; None for the usual ones.

    Raises:
        DynexportError: naming a field that is unknown or has an unsupported value.
    """
    defaults = defaults or RopeDefaults()
    rope = _Rope(fields, defaults.values)
    kind = rope.kind(defaults.types)
    share = _share(rope, defaults)
    dim = int(head_dim * share)
    # An odd dim has (dim + 1) / 2 frequencies, so one more channel is rotated.
    rotated = dim + dim % 2
    if not 2 <= rotated <= head_dim:
        raise fields.error("partial_rotary_factor", share, f"an even number of the {head_dim} channels of a head")
    if dim % 2 and kind in ("yarn", "longrope"):
        raise fields.error("partial_rotary_factor", share, f"an even number of rotated channels with {kind}")
    base = rope.number("rope_theta", fields.number(defaults.theta_name, defaults.theta))
    _agree(fields, "rope_theta", defaults.theta_name, base)
    sizes = _Sizes(base, dim, max_length, _original(rope, max_length))
    if kind == "longrope":
        return _longrope(rope, sizes)
    frequencies, attention_factor = _FORMULAS[kind](rope, sizes)
    return Rotary(rotated, tuple(frequencies), attention_factor, rope_type=kind)


def read_rotaries(
    fields: Fields, head_dim: int, max_length: int, full: RopeDefaults, sliding: RopeDefaults
) -> tuple[Rotary, Rotary]:
    """Return the rotary positions of layers without and with a window; ``rope_parameters`` has an object for each.

    As in transformers, ``rope_scaling`` and the base outside of the objects are those of layers without a window; the
    base of layers with one is ``sliding.theta_name``.

    Raises:
        DynexportError: naming a field that is unknown or has an unsupported value.
    """
    given, scaling = fields.get("rope_parameters", {}), fields.get("rope_scaling", {})
    for name, value, known in (("rope_parameters", given, set(_LAYER_TYPES)), ("rope_scaling", scaling, set(_FIELDS))):
        if not isinstance(value, dict) or value.keys() - known:
            raise fields.error(name, value, f"an object with {' and '.join(sorted(known))}")
    fields.only("partial_rotary_factor", None)
    fields.only("original_max_position_embeddings", None)
    found = []
    for layer_type, defaults, more in zip(_LAYER_TYPES, (full, sliding), (scaling, {}), strict=True):
        values = given.get(layer_type) or {}
        if not isinstance(values, dict):
            raise fields.error("rope_parameters", given, f"an object for {layer_type}")
        base = fields.number(defaults.theta_name, defaults.theta) if defaults.theta_name else defaults.theta
        inner = Fields({"rope_parameters": {"rope_theta": base, **values, **more}}, f"{fields.family}: {layer_type}")
        found.append(read_rotary(inner, head_dim, max_length, defaults))
    return found[0], found[1]


def _share(rope: _Rope, defaults: RopeDefaults) -> float:
    """Return the share of a head's channels that is rotated."""
    config, name = rope.config, "partial_rotary_factor"
    outside = config.get(defaults.share_name)
    if defaults.share is None:
        for found in (rope.get(name), outside):
            if found not in (None, 1):
                raise config.error(name, found, "1, the only one supported")
        return 1.0
    share = rope.number(name, defaults.share if outside is None else config.number(defaults.share_name))
    _agree(config, name, defaults.share_name, share)
    return share


def _agree(config: Fields, usual: str, name: str, value: float) -> None:
    """Raise DynexportError when a field's usual name contradicts the family's own name of it.

    transformers 5 reads only the family's own name.
    """
    if name != usual and config.get(usual) not in (None, value):
        raise config.error(usual, config.get(usual), f"{value:g}, the value of {name}, or no value")


def _original(rope: _Rope, max_length: int) -> int:
    """Return the original training length, in tokens; a top-level field overrides that in ``rope_parameters``."""
    name = "original_max_position_embeddings"
    outside = rope.config.get(name)
    value = rope.get(name) if outside is None else outside
    if value is None:
        return max_length
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value < 1 << 31:
        raise rope.config.error(name, value, f"an integer from 2 to {(1 << 31) - 1}")
    return value


def _default(rope: _Rope, sizes: _Sizes) -> tuple[list[float], float]:
    return sizes.plain(), 1.0


def _linear(rope: _Rope, sizes: _Sizes) -> tuple[list[float], float]:
    factor = rope.number("factor")
    return [frequency / factor for frequency in sizes.plain()], 1.0


def _dynamic(rope: _Rope, sizes: _Sizes) -> tuple[list[float], float]:
    """Return plain frequencies: they hold up to ``max_position_embeddings``; beyond, transformers changes the base."""
    rope.number("factor")
    return sizes.plain(), 1.0


def _llama3(rope: _Rope, sizes: _Sizes) -> tuple[list[float], float]:
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise rope.error("high_freq_factor", high, f"more than low_freq_factor, which is {low:g}")
    scaled = []
    for frequency in sizes.plain():
        wavelength = 2 * math.pi / frequency
        smooth = min(1.0, max(0.0, (sizes.original / wavelength - low) / (high - low)))
        scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled, 1.0


def _yarn(rope: _Rope, sizes: _Sizes) -> tuple[list[float], float]:
    """Return yarn's frequencies (arXiv 2309.00071): low ones interpolated, high ones unchanged, a ramp between them."""
    if sizes.base <= 1:
        raise rope.error("rope_theta", sizes.base, "more than 1 with yarn")
    factor = rope.optional("factor") or sizes.max_length / sizes.original
    low, high = (_rotations_dim(rope.or_zero(key) or default, sizes) for key, default in _BETAS.items())
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, sizes.dim - 1)
    width = (high - low) or 0.001
    scaled = []
    for i, frequency in enumerate(sizes.plain()):
        ramp = min(1.0, max(0.0, (i - low) / width))
        scaled.append(frequency / factor * ramp + frequency * (1 - ramp))
    return scaled, _yarn_attention_factor(rope, factor)


_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _rotations_dim(rotations: float, sizes: _Sizes) -> float:
    """Return the (fractional) channel pair that makes ``rotations`` full turns within the original length."""
    return sizes.dim * math.log(sizes.original / (rotations * 2 * math.pi)) / (2 * math.log(sizes.base))


def _yarn_attention_factor(rope: _Rope, factor: float) -> float:
    given = rope.optional("attention_factor")
    if given is not None:
        return given
    scale, all_dims = rope.or_zero("mscale"), rope.or_zero("mscale_all_dim")
    if scale is not None and all_dims is not None:
        return _mscale(factor, scale) / _mscale(factor, all_dims)
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(rope: _Rope, sizes: _Sizes) -> Rotary:
    """Return longrope's positions (arXiv 2402.13753): one set of factors up to the original length, one beyond it."""
    pairs, original = sizes.dim // 2, sizes.original
    short, long = (
        tuple(f / by for f, by in zip(sizes.plain(), rope.factors(key, pairs), strict=True))
        for key in ("short_factor", "long_factor")
    )
    attention_factor = rope.optional("attention_factor")
    if attention_factor is None:
        factor = rope.optional("factor") or sizes.max_length / original
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    beyond = LongContext(original, sizes.max_length, long) if sizes.max_length > original else None
    return Rotary(sizes.dim, short, attention_factor, rope_type="longrope", long=beyond)


_FORMULAS: dict[str, Callable[[_Rope, _Sizes], tuple[list[float], float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
