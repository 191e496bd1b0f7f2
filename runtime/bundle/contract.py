"""The routing contract, version 2: what a checkpoint says about its routing (docs/routing-contract.md).

It is in a checkpoint's ``config.json`` under ``"dynexport"`` and in every bundle's manifest. A field that is left out
takes the default given here; an unknown field is an error. ``parse_contract`` reports errors in one line; the classes
are pydantic models and raise ``ValidationError``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

import numpy as np
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

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.mod_fields import ModFields

# Strict JSON numbers: true and "2" are refused.
_Number = Annotated[float, Strict()]
_Count = Annotated[int, Strict()]
_Layer = Annotated[int, Strict(), Field(ge=-(1 << 63), lt=1 << 63)]
_Switch = Annotated[bool, Strict()]
# Far beyond any model, yet small enough to loop over.
_MOST_STEPS = 4096
_MOST_RATIOS = 64
_MOST_LOOPS = 64
SkipRule = Literal["official", "balanced", "modulo"]


class _Contract(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dense(_Contract):
    """Every token runs in every layer."""

    strategy: Literal["dense"] = "dense"


class UnifiedSkip(_Contract):
    """Unified Layer Skipping (arXiv 2404.06954): prompts run in all layers, generated tokens in the kept layers.

    Attributes:
        speedups: target ratios r >= 1; each gives one set of kept layers.
        rule: the rule that chooses the kept layers for a ratio.
        order: layers in the order in which they are left out; overrides the rule. A ratio r leaves out the first of
            them, as many as leave int(layers / r).
        keep: indices of the kept layers; overrides the rule and the order.
    """

    strategy: Literal["unified-skip"] = "unified-skip"
    speedups: tuple[_Number, ...] = Field(default=(2.0, 3.0), max_length=_MOST_RATIOS)
    rule: SkipRule = "official"
    order: tuple[_Layer, ...] | None = None
    keep: tuple[_Layer, ...] | None = None

    @field_validator("speedups")
    @classmethod
    def _finite_ratios(cls, speedups: tuple[float, ...]) -> tuple[float, ...]:
        for ratio in speedups:
            if not math.isfinite(ratio) or ratio < 1:
                raise ValueError(f"expected finite ratios >= 1, found {ratio}")
        return tuple(dict.fromkeys(speedups))

    @field_validator("order")
    @classmethod
    def _layers_once(cls, order: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if order is not None and len(set(order)) < len(order):
            raise ValueError(f"expected every layer once, found {list(order)}")
        return order

    @model_validator(mode="after")
    def _something_kept(self) -> UnifiedSkip:
        if self.keep is None and not self.speedups:
            raise ValueError("speedups: expected at least one ratio, or keep, found neither")
        if self.keep is not None and not self.keep:
            raise ValueError("keep: expected at least one layer, found none")
        return self


class Mod(ModFields):
    """Mixture-of-Depths (arXiv 2404.02258): a routed layer runs only the tokens that its router chooses."""

    strategy: Literal["mod"] = "mod"


class RadialRouter(_Contract):
    """The router of a radial network, ``fc2(silu(fc1(rms_norm(h))))``: a score for each layer of the pool and for exit.

    Attributes:
        hidden: number of units between fc1 and fc2.
        shared: whether all hops share one router; otherwise each hop has its own.
    """

    hidden: _Count = Field(default=64, ge=1, lt=1 << 31)
    shared: _Switch = True


class Radial(_Contract):
    """Radial Networks (arXiv 2404.04900): at every hop a router sends each token to a layer of the pool, or to exit.

    Attributes:
        max_steps: most hops of a token.
        min_steps: hops before exit is allowed.
        exit: whether a token may exit early; exit is the router's last score.
        allow_reuse: whether a token may visit a layer more than once.
        router: shape of the routers.
        gate: "none", h = y; "probability", h + p (y - h), where p is the softmax probability of the chosen layer among
            the allowed choices.
        cache_policy: the cache that a K/V entry is stored in: "step", the hop's, for all layers; "layer", the layer's,
            tagged with the hop.
    """

    strategy: Literal["radial"] = "radial"
    max_steps: _Count = Field(default=12, ge=1, le=_MOST_STEPS)
    min_steps: _Count = Field(default=0, ge=0)
    exit: _Switch = True
    allow_reuse: _Switch = True
    router: RadialRouter = RadialRouter()
    gate: Literal["none", "probability"] = "none"
    cache_policy: Literal["step", "layer"] = "step"

    @model_validator(mode="after")
    def _steps_in_order(self) -> Radial:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps: expected at most max_steps = {self.max_steps}, found {self.min_steps}")
        return self

    def choices(self, layers: int) -> int:
        """Return the number of a router's scores for a pool of ``layers``; exit, if there is one, is the last."""
        return layers + self.exit

    def places(self, layers: int) -> int:
        """Return the number of caches: one for each hop, or one for each of ``layers``."""
        return layers if self.cache_policy == "layer" else self.max_steps

    @property
    def entries_per_token(self) -> int:
        """The most entries of one token in one cache; with reuse, a layer may be visited at every hop."""
        return self.max_steps if self.cache_policy == "layer" and self.allow_reuse else 1


class EarlyExit(_Contract):
    """Early exit (LayerSkip, arXiv 2404.16710): generated tokens run in the first layers, then final norm and head.

    Attributes:
        exits: numbers of layers after which tokens may exit, ascending; each gives one depth.
        prompt: the layers of prompt tokens: "full", all layers; "exit", the layers of the request's depth.
    """

    strategy: Literal["early-exit"] = "early-exit"
    exits: tuple[_Layer, ...] = Field(min_length=1, max_length=_MOST_RATIOS)
    prompt: Literal["full", "exit"] = "full"

    @field_validator("exits")
    @classmethod
    def _ascending(cls, exits: tuple[int, ...]) -> tuple[int, ...]:
        if exits[0] < 1 or list(exits) != sorted(set(exits)):
            raise ValueError(f"expected ascending numbers of layers from 1, found {list(exits)!s:.80}")
        return exits


class LoopExit(_Contract):
    """The rule by which tokens exit a looped model before the last loop.

    Attributes:
        rule: "none", every token runs all loops; "hazard", a gate after every loop gives the probability to exit there;
            "change", a token exits once a loop changes its state little.
        threshold: a token exits after the first loop at which the sum of these probabilities reaches it, or whose
            change, relative to the state, is below it.
    """

    rule: Literal["none", "hazard", "change"] = "none"
    threshold: _Number = Field(default=0.5, gt=0, lt=1)


class Loop(_Contract):
    """Looped models (Ouro, arXiv 2510.25741; Huginn, 2502.05171): layers run several times with the same weights.

    Attributes:
        loops: most runs of the body.
        body: first and last layer of those that are repeated; None: all layers.
        norm_between: whether the final norm is applied to the hidden states between two runs of the body.
        norm_after: whether it is applied to them before the layers after the body.
        inject: "adapter", every run of the body begins with a projection of the last one's state and of the body's
            input together.
        state_seed: seed of the random state of all tokens before the first run, with an adapter; None: zeros.
        exit: when a token leaves before the last loop.
        exited_kv: the K/V entries of an exited token in later loops: "compute", they are computed all the same; "last",
            copies of those of its last loop; "absent", there are none.
    """

    strategy: Literal["loop"] = "loop"
    loops: _Count = Field(ge=1, le=_MOST_LOOPS)
    body: tuple[_Layer, _Layer] | None = None
    norm_between: _Switch = True
    norm_after: _Switch = False
    inject: Literal["none", "adapter"] = "none"
    state_seed: _Count | None = Field(default=None, ge=0, lt=1 << 31)
    exit: LoopExit = LoopExit()
    exited_kv: Literal["compute", "last", "absent"] = "compute"

    @model_validator(mode="after")
    def _body_in_order(self) -> Loop:
        if self.body is not None and not 0 <= self.body[0] <= self.body[1]:
            raise ValueError(f"body: expected first and last layer, from 0, found {list(self.body)}")
        return self

    def start_state(self, hidden: int) -> np.ndarray:
        """Return the state of every token before the first run of a body with an adapter, float32 [hidden].

        A random one is distributed as in Huginn's code: normal, cut at three standard deviations of sqrt(2 / 5).
        """
        if self.state_seed is None:
            return np.zeros(hidden, np.float32)
        random = np.random.default_rng(self.state_seed)
        values = random.standard_normal(hidden)
        while (outside := np.abs(values) > 3).any():
            values[outside] = random.standard_normal(int(outside.sum()))
        return (values * math.sqrt(2 / 5)).astype(np.float32)


AnyContract = Dense | UnifiedSkip | Mod | Radial | EarlyExit | Loop
Contract = Annotated[AnyContract, Field(discriminator="strategy")]
STRATEGY_NAMES = tuple(str(kind.model_fields["strategy"].default) for kind in get_args(AnyContract))
# The strategy of a checkpoint that declares none.
UNDECLARED = Dense().strategy
_ADAPTER: TypeAdapter[AnyContract] = TypeAdapter(Contract)


def parse_contract(fields: dict[str, Any], where: str) -> AnyContract:
    """Return the contract for the fields of a config or a manifest.

    Args:
        fields: the JSON object under ``"dynexport"``.
        where: the source to name in an error, such as the config's path.

    Raises:
        DynexportError: on an unknown strategy or field, or a value outside its range.
    """
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        raise DynexportError(f"{where}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one line, "field: message"."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    found = problem.get("input")
    shown = "" if isinstance(found, dict | list | tuple) or "found" in message else f", found {found!r:.80}"
    return f"{field:.80}: {message}{shown}" if field else f"{message}{shown}"
