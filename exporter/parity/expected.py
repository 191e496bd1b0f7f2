"""Checks that a verification must contain, derived from the manifest; a missing check is a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynexport.exporter.parity.cases import Prompt
from dynexport.exporter.parity.comparison import Measurement, absent
from dynexport.exporter.parity.golden import golden_rows
from dynexport.exporter.parity.ladder import CHUNKS
from dynexport.exporter.parity.reach import LongRow, full_is_refused, row_limit
from dynexport.exporter.parity.thresholds import ROUTES
from dynexport.exporter.reference.rounding import has_rounded_caches, is_rounded
from dynexport.runtime.bundle.manifest import FULL, Manifest


@dataclass(frozen=True)
class Scope:
    """Inputs of a verification.

    Attributes:
        prompts: rows of token ids.
        rows: number of prompts in the batch of prompts.
        generated: number of prompts that are continued, in one batch.
        new_tokens: tokens to generate per prompt.
        against: whether PyTorch runs the model; otherwise golden vectors are the reference.
        long: the row that reaches as far as its cost allows; None where it costs too much.
        full: the row that fills the caches of routed layers; None where it costs too much or does not apply.
    """

    prompts: Sequence[Prompt]
    rows: int
    generated: int
    new_tokens: int
    against: bool
    long: LongRow | None
    full: LongRow | None


def expected_checks(manifest: Manifest, scope: Scope) -> dict[str, int]:
    """Return check name -> number of positions that it must compare; 0 for checks that compare no logits."""
    ratios = [FULL, *(depth.name for depth in manifest.depths if depth.ratio != 1)]
    longest, decisions = max(map(len, scope.prompts)), manifest.routing is not None
    compared: dict[str, int] = {}
    if not scope.against:
        compared |= {row.check: len(row.positions) for row in golden_rows(manifest)}
    else:
        compared |= _against(manifest, scope, ratios)
    if not manifest.limits.compete and not manifest.limits.whole_prompts:
        compared["single_steps"] = longest
        compared |= {f"chunked_prefill/{chunk}": longest for chunk in CHUNKS if chunk < longest}
    exact = ["kept_sets", "constants", *(f"ratio_change/{ratio}" for ratio in ratios)]
    if not manifest.limits.compete:
        compared |= {f"batch_isolation/{ratio}": 1 for ratio in ratios}
        exact += [f"{name}/{ratio}" for ratio in ratios for name in ("neighbours", "ended_rows")]
    if scope.against:
        exact.append("rotary_angles")
    if scope.full is not None and full_is_refused(manifest, scope.full):
        exact.append("full_caches/refused")
        if is_rounded(manifest) and not has_rounded_caches(manifest):
            exact.append("arithmetic/full_caches/refused")
    found = compared | dict.fromkeys(exact, 0) | ({f"routes/{name}": 0 for name in compared} if decisions else {})
    return found | (_of_entries(scope, ratios) if scope.against and has_rounded_caches(manifest) else {})


def _of_entries(scope: Scope, ratios: Sequence[str]) -> dict[str, int]:
    """Return the checks of int8 caches: of arithmetic, of quality, and of the entries that they were made on."""
    generated = scope.prompts[: scope.generated]
    found = {f"steps/{ratio}": sum(map(len, generated)) for ratio in ratios}
    found |= {f"turns/{ratio}": 1 for ratio in ratios}
    if scope.long is not None:
        found |= {f"long/{ratio}": len(scope.long.positions) for ratio in ratios}
    checks = {f"arithmetic/{name}": positions for name, positions in found.items()}
    checks |= {f"kv_cache/{name}": positions for name, positions in found.items()}
    return checks | {f"entries/{name}": 0 for name in found}


def _against(manifest: Manifest, scope: Scope, ratios: Sequence[str]) -> dict[str, int]:
    lengths = [len(prompt) for prompt in scope.prompts]
    longest = max(lengths[: scope.generated])
    count = min(scope.new_tokens, row_limit(manifest) - longest + 1)
    found = {f"prompt/{length}": length for length in lengths}
    found["prompt/batch"] = sum(lengths[: scope.rows])
    for ratio in ratios:
        found |= {f"greedy/{ratio}": count * scope.generated, f"second_turn/{ratio}": 1}
        if scope.long is not None:
            found[f"long/{ratio}"] = len(scope.long.positions)
    if scope.full is not None:
        ways = ("steps",) if manifest.limits.whole_prompts else ("prompt", "steps")
        found |= {f"full_caches/{way}": len(scope.full.positions) for way in ways}
    if is_rounded(manifest):
        if not has_rounded_caches(manifest):
            found |= {f"arithmetic/{name}": positions for name, positions in found.items()}
        found["rounding/prompt"] = sum(lengths[: scope.rows])
    return found


def missing(measured: Sequence[Measurement], expected: dict[str, int]) -> list[Measurement]:
    """Return a failed check for every expected check that is missing or compared too few positions."""
    found = {check.name: check for check in measured}
    gaps: list[Measurement] = []
    for name, positions in expected.items():
        check = found.get(name)
        if check is None:
            gaps.append(absent(name, "expected by the manifest, but nothing was compared"))
        elif check.kind != "exact" and check.kind not in ROUTES:
            compared = check.metrics["positions"]
            if isinstance(compared, int) and compared < positions:
                gaps.append(absent(f"{name}/positions", f"expected {positions} to be compared, found {compared}"))
    return gaps


__all__ = ["Scope", "expected_checks", "missing"]
