"""The routing contract, version 1: what a checkpoint says about its routing (docs/routing-contract.md).

It stands in a checkpoint's ``config.json`` under ``"dynexport"`` and in every bundle's manifest. Every field that is
left out takes its default here; every field that is not known is an error, never ignored.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from dynexport.runtime.errors import DynexportError

CONTRACT_VERSION = 1

# Numbers as JSON has them: neither true nor "2" is one.
_Number = Annotated[float, Strict()]
_Layer = Annotated[int, Strict()]
SkipRule = Literal["official", "balanced", "modulo"]


class _Contract(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dense(_Contract):
    """Every token runs in every layer."""

    strategy: Literal["dense"] = "dense"


class UnifiedSkip(_Contract):
    """Unified Layer Skipping (arXiv 2404.06954): the prompt runs in all layers, generated tokens in the kept ones.

    Attributes:
        speedups: the target ratios r >= 1; one kept set each.
        rule: how a kept set follows from a ratio.
        keep: overrides the rule; indices of the kept layers.
    """

    strategy: Literal["unified-skip"] = "unified-skip"
    speedups: tuple[_Number, ...] = (2.0, 3.0)
    rule: SkipRule = "official"
    keep: tuple[_Layer, ...] | None = None

    @field_validator("speedups")
    @classmethod
    def _finite_ratios(cls, speedups: tuple[float, ...]) -> tuple[float, ...]:
        for ratio in speedups:
            if not math.isfinite(ratio) or ratio < 1:
                raise ValueError(f"expected finite ratios >= 1, found {ratio}")
        return tuple(dict.fromkeys(speedups))

    @model_validator(mode="after")
    def _something_kept(self) -> UnifiedSkip:
        if self.keep is None and not self.speedups:
            raise ValueError("speedups: expected at least one ratio, or keep, found neither")
        if self.keep is not None and not self.keep:
            raise ValueError("keep: expected at least one layer, found none")
        return self


Contract = Annotated[Dense | UnifiedSkip, Field(discriminator="strategy")]
STRATEGY_NAMES = tuple(str(kind.model_fields["strategy"].default) for kind in (Dense, UnifiedSkip))
_ADAPTER: TypeAdapter[Dense | UnifiedSkip] = TypeAdapter(Contract)


def parse_contract(fields: dict[str, Any], where: str) -> Dense | UnifiedSkip:
    """Read contract fields as they stand in a config or a manifest.

    Args:
        fields: the JSON object under ``"dynexport"``.
        where: what to name in an error, such as the config's path.

    Raises:
        DynexportError: on an unknown strategy or field, or a value outside its range.
    """
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        raise DynexportError(f"{where}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as "field: message", in one line."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    found = problem.get("input")
    shown = "" if isinstance(found, dict | list | tuple) or "found" in message else f", found {found!r:.80}"
    return f"{field:.80}: {message}{shown}" if field else f"{message}{shown}"
