"""The fields of Mixture-of-Depths in the routing contract, and which of them go together (docs/routing-contract.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from dynexport.runtime.bundle.graphs import Part

# Strict JSON numbers: true and "2" are refused.
_Number = Annotated[float, Strict()]
_Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
_Layer = Annotated[int, Strict(), Field(ge=-(1 << 63), lt=1 << 63)]
_BLOCK, _ATTENTION, _MLP, _BOTH = "block", "attention", "mlp", "attention+mlp"


class Decision(Part):
    """The causal decision of a routed layer: a token runs if ``sigmoid(logit) comparison threshold``.

    Attributes:
        rule: "router", the logit is the router's score; "predictor", it is the output of a small MLP; "always", every
            token runs.
        threshold: the threshold that the probability is compared with.
        comparison: whether a probability equal to the threshold runs (">=") or skips (">").
    """

    rule: Literal["router", "predictor", "always"] = "router"
    threshold: _Number = Field(default=0.5, allow_inf_nan=False)
    comparison: Literal[">", ">="] = ">"


class RoutedCache(Part):
    """The KV cache of a routed layer: its size, and what happens when it is full.

    Attributes:
        capacity: share of ``max_length``; a row has ``ceil(capacity * max_length)`` entries.
        overflow: what a token does when the cache is full: "residual", it skips the layer and is counted; "error",
            generation stops.
    """

    capacity: _Number = Field(default=1.0, gt=0, le=1)
    overflow: Literal["residual", "error"] = "residual"


class ModRouter(Part):
    """The form of the routers.

    Attributes:
        kind: "linear", one product; "bottleneck", ``fc2(tanh(norm(fc1(x))))``; "mlp", ``fc2(activation(norm(fc1(x))))``
            where the norm may be absent; "pair", two products, the score of running minus that of skipping.
        activation: of an "mlp".
        epsilon: of the norm; None: the family's.
    """

    kind: Literal["linear", "bottleneck", "mlp", "pair"] = "linear"
    activation: Literal["silu", "relu"] = "silu"
    epsilon: Annotated[float, Strict(), Field(gt=0, lt=1)] | None = None


class ModFields(Part):
    """The fields of Mixture-of-Depths.

    Attributes:
        version: version of these fields; 1 has none of those from ``target`` on, whose defaults mean what it means.
        routed_layers: layers with a router, ascending.
        capacity: share of a sequence's tokens that top-k chooses.
        rounding: rounding of capacity * tokens.
        router_input: "hidden", the layer's input; "normed", the output of the layer's input norm.
        gate: the factor g: "raw", the score; "sigmoid", its sigmoid; "none", 1; "split", the sigmoid for the MLP's
            branch and 1 - sigmoid for the skip branch; "affine", a linear function of the sigmoid for the MLP's branch.
        combine: the layer's result for input h and layer output y: "delta", h + g (y - h); "replace", g y.
        decision: the causal rule for a single token.
        prefill: the rule for prompts: "causal", or "topk" as in training, which is not causal.
        positions: position ids in a routed layer: "original", or "compact", the token's index in the layer's cache.
        thresholds: a threshold for single layers, by layer index, instead of ``decision.threshold``; written by
            calibration.
        cache: size and overflow rule of a routed layer's KV cache.
        target: what a token skips: "block", attention and MLP by one decision; "attention"; "mlp"; "attention+mlp",
            both, each by a router of its own.
        skipped_kv: the entries of a token that skips attention: "none"; "own", keys and values of its own.
        router: the form of the routers.
        skip_branch: what a token that skips the MLP computes instead: "none"; "adapter", a small MLP.
        affine: for the gate "affine", a and b of the factor a + b * sigmoid(score).
        keep_first: number of tokens at the beginning of a sequence that run in every layer.
        level: what a decision is about: a "token", or a "sequence", by the mean over its first prompt.
        boundary: the tokens that top-k chooses: the "k" best, or "k-1", those above the k-th score.
    """

    version: Literal[1, 2] = 2
    routed_layers: tuple[_Layer, ...] = Field(min_length=1)
    capacity: _Number = Field(default=0.125, gt=0, le=1)
    rounding: Literal["floor", "ceil"] = "floor"
    router_input: Literal["hidden", "normed"] = "hidden"
    gate: Literal["raw", "sigmoid", "none", "split", "affine"] = "raw"
    combine: Literal["delta", "replace"] = "delta"
    decision: Decision = Decision()
    prefill: Literal["causal", "topk"] = "causal"
    positions: Literal["original", "compact"] = "original"
    cache: RoutedCache = RoutedCache()
    thresholds: dict[int, _Number] = Field(default_factory=dict)
    target: Literal["block", "attention", "mlp", "attention+mlp"] = "block"
    skipped_kv: Literal["none", "own"] = "none"
    router: ModRouter = ModRouter()
    skip_branch: Literal["none", "adapter"] = "none"
    affine: tuple[_Finite, _Finite] | None = None
    keep_first: Annotated[int, Strict()] = Field(default=0, ge=0, lt=1 << 31)
    level: Literal["token", "sequence"] = "token"
    boundary: Literal["k", "k-1"] = "k"

    @field_validator("routed_layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers) or min(layers, default=0) < 0:
            raise ValueError(f"expected different layers from 0, found {list(layers)}")
        return tuple(sorted(layers))

    @model_validator(mode="after")
    def _thresholds_of_routed_layers(self) -> ModFields:
        unrouted = sorted(set(self.thresholds) - set(self.routed_layers))
        if unrouted:
            raise ValueError(f"thresholds: expected routed layers, found {unrouted[0]}")
        if not all(math.isfinite(value) for value in self.thresholds.values()):
            raise ValueError("thresholds: expected finite numbers, found NaN or infinity")
        return self

    @model_validator(mode="after")
    def _go_together(self) -> ModFields:
        if self.version == 1:
            for name in ("target", "skipped_kv", "router", "skip_branch", "keep_first", "level", "boundary"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"version: expected 2, which has the field {name}, found 1")
            if self.gate in ("split", "affine"):
                raise ValueError(f"version: expected 2, which has the gate {self.gate}, found 1")
        for problem in self._conflicts():
            raise ValueError(problem)
        return self

    def _conflicts(self) -> Iterator[str]:
        """Yield what is wrong with the values together, one line each."""
        yield from self._conflicts_of_caches()
        yield from self._conflicts_of_branches()
        if self.prefill == "topk":
            for name in ("target", "skipped_kv", "keep_first", "level"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield f"prefill: expected causal with {name} {getattr(self, name)}, found topk"
        elif self.boundary == "k-1":
            yield "boundary: expected k where prompts are routed causally, found k-1; it is about prefill topk"
        if self.decision.rule == "predictor" and (self.router.kind, self.level, self.target == _BOTH) != (
            "linear",
            "token",
            False,
        ):
            yield (
                "decision.rule: expected router or always with router.kind other than linear, level sequence or "
                "target attention+mlp, found predictor"
            )
        if self.router.activation != "silu" and self.router.kind != "mlp":
            yield f"router.activation: expected silu where router.kind is not mlp, found {self.router.activation}"
        if self.router.epsilon is not None and self.router.kind not in ("bottleneck", "mlp"):
            yield f"router.epsilon: expected none where router.kind is {self.router.kind}, found {self.router.epsilon}"

    def _conflicts_of_caches(self) -> Iterator[str]:
        all_have_entries = self.target == _MLP or self.skipped_kv == "own"
        if self.target == _MLP and self.skipped_kv == "own":
            yield "skipped_kv: expected none with target mlp, as no token skips attention, found own"
        if all_have_entries and self.positions == "compact":
            yield "positions: expected original where every token has an entry in the layer's cache, found compact"
        if all_have_entries and self.cache.capacity != 1:
            yield (
                "cache.capacity: expected 1 where every token has an entry in the layer's cache, found "
                f"{self.cache.capacity:g}"
            )
        if self.level == "sequence":
            wrong = (self.target not in (_BLOCK, _ATTENTION), self.skipped_kv != "none", self.keep_first > 0)
            if any(wrong):
                yield (
                    "level: expected token with target mlp or attention+mlp, skipped_kv own or keep_first, as the "
                    "decision about a sequence is whether its tokens have entries, found sequence"
                )
            if self.gate != "none":
                yield f"gate: expected none with level sequence, found {self.gate}"
            if self.cache.capacity != 1:
                yield f"cache.capacity: expected 1 with level sequence, found {self.cache.capacity:g}"

    def _conflicts_of_branches(self) -> Iterator[str]:
        if self.gate in ("split", "affine") and self.target == _ATTENTION:
            yield f"gate: expected raw, sigmoid or none with target attention, found {self.gate}, which is the MLP's"
        if self.combine == "replace" and (self.target != _BLOCK or self.gate in ("split", "affine")):
            yield f"combine: expected delta with target {self.target} and gate {self.gate}, found replace"
        if (self.affine is None) == (self.gate == "affine"):
            found = "none" if self.affine is None else list(self.affine)
            yield f"affine: expected two numbers with gate affine and only there, found {found}"
        if self.skip_branch == "adapter" and self.target == _ATTENTION:
            yield "skip_branch: expected none with target attention, found adapter, which is in the MLP's place"
        if self.skip_branch == "adapter" and self.gate not in ("none", "split"):
            yield f"gate: expected none or split with skip_branch adapter, found {self.gate}"

    @property
    def decisions_per_layer(self) -> int:
        """The number of routers of a routed layer: attention's and the MLP's, or one."""
        return 2 if self.target == _BOTH else 1

    @property
    def all_have_entries(self) -> bool:
        """Whether every token has an entry in a routed layer's cache."""
        return self.target == _MLP or self.skipped_kv == "own"

    @property
    def whole_prompts(self) -> bool:
        """Whether a decision depends on a whole prompt, which can then not be cut."""
        return self.prefill == "topk" or self.level == "sequence"

    def threshold(self, layer: int) -> float:
        """Return the threshold of a routed layer."""
        return self.thresholds.get(layer, self.decision.threshold)

    def slots(self, max_length: int) -> int:
        """Return the most entries of a row in a routed layer's cache; the capacity is taken as an exact decimal."""
        return min(max_length, math.ceil(Fraction(str(self.cache.capacity)) * max_length))


__all__ = ["Decision", "ModFields", "ModRouter", "RoutedCache"]
