"""Result of a verification, as plain data to show, save and judge again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from dynexport.exporter.parity.comparison import Measurement
from dynexport.exporter.parity.metrics import Metrics, number
from dynexport.exporter.parity.thresholds import ROUTES, Kind, PrecisionLimits, judge, judge_routes
from dynexport.runtime.bundle.json_text import with_nulls
from dynexport.runtime.bundle.manifest import Precision

Place: TypeAlias = int | Literal["embedding", "head", "router"]
"""A layer's number, the embedding, the head (with the final norm), or the router of paths."""
_HEADLINES = ("identical", "max_abs", "mean_kl", "top1_agreement")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Part):
    """A judged check.

    Attributes:
        name: name of the check, followed by "/" and its ratio or length.
        kind: limits that apply.
        skipped: whether tokens skipped layers.
        passed: whether no limit was exceeded.
        ambiguous: tokens that differ from the reference within a near-tie; they count neither as equal nor as wrong.
        failures: exceeded limits, one phrase each.
        metrics: measured values.
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
        """Return the check for a measurement and its limits."""
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
        """Return whether the check compares routing decisions instead of logits."""
        return self.kind in ROUTES

    @property
    def headlines(self) -> Metrics:
        """Return the most important metrics."""
        return {name: self.metrics[name] for name in _HEADLINES if name in self.metrics}


class Departure(_Part):
    """The first place where a failed check diverges from the reference.

    Attributes:
        check: name of the failed check.
        first: number of the first layer that diverges, "embedding", "head" (final norm and head), or "router" where
            paths differ.
        of: "output" if hidden states diverge, "decisions" if only routing decisions do.
        limit: relative error above which an output diverges; for decisions, the margin of a near-tie.
        errors: relative error of the hidden states after the embedding and after every layer, in order; for decisions,
            the largest margin of a wrong decision, by layer, or by hop of a path.
    """

    check: str
    first: Place
    of: Literal["output", "decisions"] = "output"
    limit: float
    errors: dict[str, float | None]


class Report(_Part):
    """Report of a verification; ``Report.model_validate`` reads the output of ``to_json``.

    Attributes:
        passed: whether every check passed.
        bundle: directory of the bundle.
        against: the model that PyTorch ran; None where golden vectors were the reference.
        precision: precision of the bundle.
        max_abs_logit_error: largest logit error of all checks against the reference; None for NaN or infinity.
        token_agreement: share of positions with the reference's top-1 token, near-ties excluded.
        ambiguous_tokens: number of these near-ties.
        route_agreement: share of routing decisions that are the reference's; None without routers.
        route_flips: number of different decisions that do not follow from another one; ``flip_margins`` in the checks'
            metrics has their margins.
        first_departing_layer: ``departure.first``.
        departure: where the first failed check diverges; None if unknown or if all checks passed.
        not_exercised: what no check reached, one phrase each.
        reference: name of the loader that read the checkpoint for PyTorch; "" if golden vectors do not record it.
        checks: all checks, in order.
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
        """Return the report of judged checks."""
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
        """Return the report of the same metrics with other limits."""
        checks = [Check.judged(Measurement(c.name, c.kind, c.metrics, skipped=c.skipped), limits) for c in self.checks]
        return Report.of(
            self.bundle, self.against, self.precision, checks, self.departure, self.not_exercised, self.reference
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields for ``json.dumps``; infinity and NaN, which JSON lacks, become null."""
        fields: dict[str, Any] = with_nulls(self.model_dump())
        return fields
