"""The parity checks, one function each; they measure, and thresholds.py judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.parity.cases import Prompt, generate, replay, routes
from dynexport.exporter.parity.comparison import (
    Measurement,
    Run,
    absent,
    answered,
    compared,
    replayed,
    run,
    skips,
    wishes,
)
from dynexport.exporter.parity.constants import angle_differences, differences
from dynexport.exporter.parity.golden import GoldenRow
from dynexport.exporter.parity.metrics import FloatArray, Metrics, compare_bits, compare_logits
from dynexport.exporter.parity.reach import STEPS, LongRow, full_is_refused, row_limit
from dynexport.exporter.parity.thresholds import Kind
from dynexport.exporter.reference import Answer, Case, Oracle
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.executor import Executor

CHUNKS = (1, 3, 16)
# Decode steps of checks that are not about generation.
_STEPS = 8


def kept_sets(bundle: Bundle) -> Measurement:
    """Check that the manifest's depths are those of its contract."""
    manifest = bundle.manifest
    wanted = strategies()[manifest.contract.strategy].depths(manifest.contract, manifest.model.layers)
    # The contract does not say whether the checkpoint was trained for a depth.
    found = {depth.name: depth.model_copy(update={"trained": False}) for depth in manifest.depths}
    metrics: Metrics = {
        "identical": wanted == tuple(found.values()),
        "differences": [
            f"kept set {depth.name}: expected {list(depth.keep)}, found "
            f"{list(found[depth.name].keep) if depth.name in found else 'none'}"
            for depth in wanted
            if found.get(depth.name) != depth
        ],
        "contract": [list(depth.keep) for depth in wanted],
        "manifest": [list(depth.keep) for depth in manifest.depths],
    }
    return Measurement("kept_sets", "exact", metrics)


def constants(bundle: Bundle) -> Measurement:
    """Check that the constants in the graphs are those of config and contract."""
    found = differences(bundle)
    return Measurement("constants", "exact", {"identical": not found, "differences": list(found)})


def rotary_angles(bundle: Bundle) -> Measurement:
    """Check rotary angles from the config against transformers' module, up to the last position."""
    found = angle_differences(bundle.manifest)
    return Measurement("rotary_angles", "exact", {"identical": not found, "differences": list(found)})


def golden_row(executor: Executor, row: GoldenRow, there: tuple[Case, Answer] | None) -> list[Measurement]:
    """Compare the bundle with one row of its golden vectors; a missing row is a failure."""
    if there is None:
        return [
            absent(
                row.check,
                f"expected logits of {len(row.positions)} positions under {row.name}, found none; convert again",
            )
        ]
    case, answer = there
    return replayed(row.check, executor, [case], [answer], at=row.positions, kind=row.kind)


def long_rows(
    executor: Executor, oracle: Oracle, row: LongRow, tokens: Prompt, ratios: Sequence[Depth]
) -> list[Measurement]:
    """Compare the long row at every ratio: logits of selected positions, all routing decisions."""
    cases = [Case(tuple(tokens[: row.length]), ((0, row.prompt),), depth) for depth in ratios]
    answers = oracle.answers(cases, at=row.positions)
    found: list[Measurement] = []
    for case, answer in zip(cases, answers, strict=True):
        found += replayed(f"long/{case.depth.name}", executor, [case], [answer], at=row.positions)
    return found


def full_caches(executor: Executor, oracle: Oracle, row: LongRow, tokens: Prompt) -> list[Measurement]:
    """Compare rows whose tokens are all forced to run, until a cache is full and beyond.

    One row is a prefill, the other has decode steps at its end. Where prompts choose by top-k, the contract limits the
    tokens that run in a prompt; then there is one row, of decode steps.
    """
    manifest, full = executor.manifest, executor.manifest.full
    length = row.length
    forced = everywhere(manifest, length)
    prompts = {"prompt": length, "steps": max(1, length - 2 * STEPS)}
    if manifest.limits.whole_prompts:
        prompts = {"steps": 1}
    cases = {name: Case(tuple(tokens[:length]), ((0, size),), full, forced) for name, size in prompts.items()}
    found: list[Measurement] = []
    for name, case in cases.items():
        at = tuple(sorted({*row.positions, case.prompted[0][1] - 1}))
        answer = _certain(oracle.answers([case], at=at)[0])
        try:
            found += replayed(f"full_caches/{name}", executor, [case], [answer], at=at)
        except DynexportError as error:  # a full cache, where the contract says that it is an error
            found.append(absent(f"full_caches/{name}", str(error)))
    if full_is_refused(manifest, row):
        found.append(_refused_when_full(executor, cases["steps"], tokens[length]))
    return found


def _refused_when_full(executor: Executor, case: Case, token: int) -> Measurement:
    """Check that one token more than the caches hold raises DynexportError."""
    assert case.forced is not None
    one_more = Case(
        (*case.tokens, token), case.prompted, case.depth, np.pad(case.forced, ((0, 0), (0, 1)), mode="edge")
    )
    difference = f"expected an error for {len(one_more.tokens)} tokens that run in every layer, found none"
    try:
        replay(executor, [one_more])
    except DynexportError:
        return Measurement("full_caches/refused", "exact", {"identical": True})
    return absent("full_caches/refused", difference)


def everywhere(manifest: Manifest, length: int) -> NDArray[np.int64]:
    """Return decisions int64 [R, length] by which tokens run every routed layer, or ``path_through`` layer 0."""
    if isinstance(manifest.routing, LayerRouting):
        return np.ones((manifest.routing.decisions, length), np.int64)
    assert isinstance(manifest.routing, PathRouting)
    return np.repeat(path_through(manifest.routing, manifest.model.layers, 0)[:, None], length, axis=1)


def path_through(routing: PathRouting, layers: int, first: int) -> NDArray[np.int64]:
    """Return the path int64 [hops] that repeats a layer, or without reuse runs each layer once from it on."""
    hops = np.arange(routing.hops)
    if routing.reuse:
        return np.full_like(hops, first)
    path = np.where(hops < layers, (first + hops) % layers, -1)
    if routing.exit and routing.hops > layers and routing.min_hops <= layers:
        path[layers] = layers  # after the last layer, the exit is still a decision
    return path


def _certain(answer: Answer) -> Answer:
    """Return an answer with infinite margins: routes are forced, so a different decision is not a near-tie."""
    assert answer.routes is not None
    margin = np.full_like(answer.routes.margin, np.inf)
    return replace(answer, routes=replace(answer.routes, margin=margin))


def prompts_alone_and_together(
    executor: Executor, oracle: Oracle, prompts: Sequence[Prompt], rows: int
) -> list[Measurement]:
    """Compare the logits of all prompt tokens: each prompt alone, then ``rows`` of them in a padded batch."""
    full = executor.manifest.full
    cases = [Case(tuple(prompt), ((0, len(prompt)),), full) for prompt in prompts]
    answers = oracle.answers(cases)
    found: list[Measurement] = []
    for case, answer in zip(cases, answers, strict=True):
        found += replayed(f"prompt/{len(case.tokens)}", executor, [case], [answer])
    return found + replayed("prompt/batch", executor, cases[:rows], answers[:rows])


def greedy(
    executor: Executor, oracle: Oracle, prompts: Sequence[Prompt], depth: Depth, count: int
) -> list[Measurement]:
    """Compare greedy generation: the engine generates in a right-padded batch, the reference scores its tokens.

    Args:
        executor: runs the bundle.
        oracle: the model in PyTorch.
        prompts: rows of token ids.
        depth: layers that generated tokens run.
        count: tokens to generate; fewer where the context ends earlier.
    """
    longest = max(map(len, prompts))
    count = min(count, row_limit(executor.manifest) - longest + 1)
    cache = executor.full_cache(len(prompts), longest + count, record=True)
    first = executor.prefill(cache, prompts, depth=depth, all_logits=True)
    # The last generated token is never an input.
    last = np.concatenate([logits[-1:] for logits in first])
    fed, later = generate(executor, cache, last, depth, count - 1)
    cases = [Case((*prompt, *tokens), ((0, len(prompt)),), depth) for prompt, tokens in zip(prompts, fed, strict=True)]
    found = Run([np.concatenate(parts) for parts in zip(first, later, strict=True)], routes(cache))
    expected = answered(oracle.answers(cases))
    return compared(f"greedy/{depth.name}", "reference", executor, cases, expected, found, last=count)


def second_turn(executor: Executor, oracle: Oracle, prompts: Sequence[Prompt], depth: Depth) -> list[Measurement]:
    """Compare a conversation: prompt, generated tokens, second prompt, generated tokens."""
    room = row_limit(executor.manifest) - sum(map(len, prompts))
    steps = min(_STEPS, room // len(prompts))
    cache = executor.full_cache(1, sum(map(len, prompts)) + steps * len(prompts), record=True)
    tokens: list[int] = []
    prompted = []
    found: list[FloatArray] = []
    for prompt in prompts:
        prompted.append((len(tokens), len(tokens) + len(prompt)))
        logits = executor.prefill(cache, [prompt], depth=depth, all_logits=True)[0]
        fed, later = generate(executor, cache, logits[-1:], depth, steps)
        tokens += [*prompt, *fed[0]]
        found += [logits, later[0]]
    cases = [Case(tuple(tokens), tuple(prompted), depth)]
    expected, own = answered(oracle.answers(cases)), Run([np.concatenate(found)], routes(cache))
    return compared(f"second_turn/{depth.name}", "reference", executor, cases, expected, own)


def batch_isolation(executor: Executor, prompts: Sequence[Prompt], depth: Depth) -> list[Measurement]:
    """Compare every row of a batch with the row alone, and bit by bit with the row among other tokens.

    Kernels may round differently for another batch size. At the same batch size and lengths, the tokens of other rows
    must not change a bit. An expert multiplies all tokens that chose it at once, so its batch size depends on the
    other rows' tokens: there the difference must be one of rounding. So it is with dynexport's CPU operators in layers
    that run the chosen tokens of all rows.
    """
    manifest, cases = executor.manifest, _forced(executor, prompts, depth)
    together, single = run(executor, cases), [run(executor, [case]) for case in cases]
    alone = Run([one.logits[0] for one in single], [row for one in single for row in one.decided])
    vocabulary = manifest.model.vocab_size
    others = [Case(tuple((t + 1) % vocabulary for t in case.tokens), case.prompted, depth) for case in cases]
    among_others = [replay(executor, [*others[:i], case, *others[i + 1 :]])[i] for i, case in enumerate(cases)]
    mixed = manifest.cost.experts > 0 or (isinstance(manifest.routing, LayerRouting) and bool(manifest.operators))
    metrics = (compare_logits if mixed else compare_bits)(together.logits, among_others)
    kind: Kind = "consistency" if mixed else "exact"
    return [
        *compared(f"batch_isolation/{depth.name}", "consistency", executor, cases, alone, together),
        Measurement(f"neighbours/{depth.name}", kind, metrics, skips(executor, depth)),
    ]


def ended_rows(executor: Executor, prompts: Sequence[Prompt], depth: Depth) -> Measurement:
    """Compare rows that decode while others wait or have ended with the same rows in one full batch.

    The first row starts to decode after the other rows have ended.
    """
    cases = _forced(executor, prompts, depth)
    together = run(executor, cases)
    steps = len(cases[0].tokens) - cases[0].prompted[0][1]
    # With room for entries of idle rows, which must not appear.
    cache = executor.full_cache(len(cases), max(len(case.tokens) for case in cases) + steps)
    told = [wishes(row) for row in together.decided]
    starts = [case.prompted[0][1] for case in cases]
    begins = np.array([steps, *[0] * (len(cases) - 1)])
    forced = [row[:, :start] for row, start in zip(told, starts, strict=bool(told))]
    given = [case.tokens[:start] for case, start in zip(cases, starts, strict=True)]
    parts = [list(rows) for rows in executor.prefill(cache, given, depth=depth, all_logits=True, forced=forced or None)]
    for now in range(2 * steps):
        live = (begins <= now) & (now < begins + steps)
        places = np.add(starts, np.clip(now - begins, 0, steps - 1)).tolist()
        tokens = [case.tokens[place] for case, place in zip(cases, places, strict=True)]
        wish = np.stack([row[:, place] for row, place in zip(told, places, strict=True)], axis=1) if told else None
        logits = executor.step(cache, tokens, depth, live, forced=wish)
        for row in np.flatnonzero(live):
            parts[row].append(logits[row])
    metrics = compare_logits(together.logits, [np.stack(rows) for rows in parts])
    return Measurement(f"ended_rows/{depth.name}", "consistency", metrics, skips(executor, depth))


def single_steps(executor: Executor, prompt: Prompt) -> list[Measurement]:
    """Compare one prefill of a prompt with single decode steps for its tokens, at full depth."""
    full = executor.manifest.full
    at_once = run(executor, [Case(tuple(prompt), ((0, len(prompt)),), full)])
    one_by_one = [Case(tuple(prompt), ((0, 1),), full)]
    return compared("single_steps", "consistency", executor, one_by_one, at_once, run(executor, one_by_one))


def chunked_prefill(executor: Executor, prompt: Prompt) -> list[Measurement]:
    """Compare one prefill of a prompt with prefills in chunks."""
    cases = [Case(tuple(prompt), ((0, len(prompt)),), executor.manifest.full)]
    at_once = run(executor, cases, chunk=len(prompt))
    found: list[Measurement] = []
    for chunk in CHUNKS:
        if chunk < len(prompt):
            pieces = run(executor, cases, chunk=chunk)
            found += compared(f"chunked_prefill/{chunk}", "consistency", executor, cases, at_once, pieces, chunk=chunk)
    return found


def ratio_change(executor: Executor, fresh: Executor, prompts: Sequence[Prompt], depth: Depth) -> Measurement:
    """Compare a request on a used cache, after one at full depth, bit by bit with the request on a new executor.

    Args:
        executor: runs both requests.
        fresh: an executor that has not run yet.
        prompts: prompts of the first and of the compared request.
        depth: depth of the compared request.
    """
    before = _forced(executor, prompts[:1], executor.manifest.full)
    after = _forced(executor, prompts[1:2], depth)
    slots = max(len(case.tokens) for case in (*before, *after))
    cache = executor.full_cache(1, slots)
    replay(executor, before, cache=cache)
    cache.rewind(0)
    used = replay(executor, after, cache=cache)
    new = replay(fresh, after, cache=fresh.full_cache(1, slots))
    return Measurement(f"ratio_change/{depth.name}", "exact", compare_bits(new, used), skips(executor, depth))


def _forced(executor: Executor, prompts: Sequence[Prompt], depth: Depth) -> list[Case]:
    """Return cases of the prompts, continued by the same number of tokens, which repeat the prompt."""
    fed = min(_STEPS, row_limit(executor.manifest) - max(map(len, prompts)))
    return [
        Case(tuple(np.resize(prompt, len(prompt) + fed).tolist()), ((0, len(prompt)),), depth) for prompt in prompts
    ]
