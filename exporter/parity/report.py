"""What a verification found: plain data, to be shown, saved, and judged again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from dynexport.exporter.parity.comparison import Measurement
from dynexport.exporter.parity.metrics import Metrics, number
from dynexport.exporter.parity.thresholds import ROUTES, Kind, PrecisionLimits, judge, judge_routes
from dynexport.runtime.bundle.manifest import Precision

Place: TypeAlias = int | Literal["embedding", "head", "router"]
"""A layer; what stands before the first, or after the last: final norm and head; or the router of paths."""
_HEADLINES = ("identical", "max_abs", "mean_kl", "top1_agreement")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Part):
    """One check, judged.

    Attributes:
        name: what was checked, and after slashes at which ratio or length.
        kind: what it was held to.
        skipped: whether tokens ran in fewer than all layers.
        ambiguous: tokens that differ from the reference's within a near-tie: neither agreement nor failure.
        failures: what is beyond its limit, one phrase each.
    """

    name: str
    kind: Kind
    skipped: bool
    passed: bool
    ambiguous: int
    failures: tuple[str, ...]
    metrics: Metrics

    @classmethod
    def judged(cls, measurement: Measurement, limits: PrecisionLimits) -> Check:
        """A measurement held to limits."""
        m = measurement
        if m.kind in ROUTES:
            verdict = judge_routes(m.metrics, limits.of_routes(m.kind))
        else:
            verdict = judge(m.kind, m.metrics, limits.of(m.kind, skipped=m.skipped))
        return cls(
            name=m.name,
            kind=m.kind,
            skipped=m.skipped,
            passed=not verdict.failures,
            ambiguous=verdict.ambiguous,
            failures=verdict.failures,
            metrics=m.metrics,
        )

    @property
    def of_routes(self) -> bool:
        """Whether it compares decisions, not logits."""
        return self.kind in ROUTES

    @property
    def headlines(self) -> Metrics:
        """The metrics to show where there is little room."""
        return {name: self.metrics[name] for name in _HEADLINES if name in self.metrics}


class Departure(_Part):
    """Where a failed check goes astray.

    Attributes:
        check: its name.
        first: the first layer that departs, or "embedding", or "head" (final norm and head); "router" where tokens of a
            pool are sent elsewhere.
        of: whether its output departs, or nothing but its decisions.
        limit: the relative error from which on it does; of decisions, the margin.
        errors: relative error of the hidden states after the embedding and after every layer, in order; of decisions,
            the largest margin of a wrong one, by layer, or by step of a path.
    """

    check: str
    first: Place
    of: Literal["output", "decisions"] = "output"
    limit: float
    errors: dict[str, float | None]


class Report(_Part):
    """A whole verification. ``Report.model_validate`` reads what ``to_json`` wrote.

    Attributes:
        bundle: its directory.
        against: the model that PyTorch ran, or None where golden vectors stood for it.
        max_abs_logit_error: the largest of any check against the reference; None for NaN or infinity.
        token_agreement: share of tokens that are the reference's choice, near-ties left out.
        ambiguous_tokens: those near-ties.
        route_agreement: share of routed layers' decisions that are the reference's; None where no layer is routed.
        route_flips: decisions that are not, and follow from no other; ``flip_margins`` of the checks say how near the
            reference was to them.
        first_departing_layer: ``departure.first``.
        not_exercised: what no check went to, one phrase each.
        reference: who has read the checkpoint for PyTorch; "" where golden vectors do not say.
    """

    passed: bool
    bundle: str
    against: str | None
    precision: Precision
    max_abs_logit_error: float | None
    token_agreement: float
    ambiguous_tokens: int
    route_agreement: float | None = None
    route_flips: int = 0
    first_departing_layer: Place | None = None
    departure: Departure | None = None
    not_exercised: tuple[str, ...] = ()
    reference: str = ""
    checks: tuple[Check, ...]

    @classmethod
    def of(
        cls,
        bundle: str,
        against: str | None,
        precision: Precision,
        checks: Sequence[Check],
        departure: Departure | None = None,
        not_exercised: tuple[str, ...] = (),
        reference: str = "",
    ) -> Report:
        """Sum up checks."""
        compared = [check for check in checks if check.kind == "reference"]
        ambiguous = sum(check.ambiguous for check in compared)
        decided = sum(int(number(check.metrics["positions"])) for check in compared) - ambiguous
        agreed = sum(int(number(check.metrics["agreed"])) for check in compared)
        routed = [check.metrics for check in checks if check.kind == "routes"]
        decisions = sum(int(number(metrics["decisions"])) for metrics in routed)
        return cls(
            passed=all(check.passed for check in checks),
            bundle=bundle,
            against=against,
            precision=precision,
            max_abs_logit_error=max((number(check.metrics["max_abs"]) for check in compared), default=0.0),
            token_agreement=agreed / decided if decided else 1.0,
            ambiguous_tokens=ambiguous,
            route_agreement=sum(number(m["agreed"]) for m in routed) / decisions if decisions else None,
            route_flips=sum(len(m["flips"]) for m in routed if isinstance(m["flips"], list)),
            first_departing_layer=None if departure is None else departure.first,
            departure=departure,
            not_exercised=not_exercised,
            reference=reference,
            checks=tuple(checks),
        )

    def judged_again(self, limits: PrecisionLimits) -> Report:
        """The same metrics held to other limits."""
        checks = [Check.judged(Measurement(c.name, c.kind, c.metrics, skipped=c.skipped), limits) for c in self.checks]
        return Report.of(
            self.bundle, self.against, self.precision, checks, self.departure, self.not_exercised, self.reference
        )

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``; infinity and NaN, which JSON lacks, become null."""
        fields: dict[str, Any] = _json(self.model_dump())
        return fields


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
