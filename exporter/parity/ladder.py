"""The checks, from one pass at full depth to a conversation's second turn: each a function, and figures only."""

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
# Tokens fed one by one where generating is not what is checked.
_STEPS = 8


def kept_sets(bundle: Bundle) -> Measurement:
    """The manifest's depths are those that its contract asks for."""
    manifest = bundle.manifest
    wanted = strategies()[manifest.contract.strategy].depths(manifest.contract, manifest.model.layers)
    # Whether a checkpoint was trained for one is not the contract's to say.
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
    """Thresholds, windows, frequencies and the like in the graphs are those that config and contract say."""
    found = differences(bundle)
    return Measurement("constants", "exact", {"identical": not found, "differences": list(found)})


def rotary_angles(bundle: Bundle) -> Measurement:
    """Rotary angles, as they were read from the config, are those of transformers' own module, to the last position."""
    found = angle_differences(bundle.manifest)
    return Measurement("rotary_angles", "exact", {"identical": not found, "differences": list(found)})


def golden_row(executor: Executor, row: GoldenRow, there: tuple[Case, Answer] | None) -> list[Measurement]:
    """What PyTorch computed when the bundle was made; a row that is not there has failed."""
    if there is None:
        return [
            absent(
                row.check,
                f"expected logits of {len(row.positions)} positions under {row.name}, found none; convert again",
            )
        ]
    case, answer = there
    kind: Kind = "arithmetic" if row.dequantised else "reference"
    return replayed(row.check, executor, [case], [answer], at=row.positions, kind=kind)


def long_rows(
    executor: Executor, oracle: Oracle, row: LongRow, tokens: Prompt, ratios: Sequence[Depth]
) -> list[Measurement]:
    """A row that goes as far as is worth its cost, at every ratio; logits of some positions, all decisions."""
    cases = [Case(tuple(tokens[: row.length]), ((0, row.prompt),), depth) for depth in ratios]
    answers = oracle.answers(cases, at=row.positions)
    found: list[Measurement] = []
    for case, answer in zip(cases, answers, strict=True):
        found += replayed(f"long/{case.depth.name}", executor, [case], [answer], at=row.positions)
    return found


def full_caches(executor: Executor, oracle: Oracle, row: LongRow, tokens: Prompt) -> list[Measurement]:
    """Every token runs, whatever routers say, until a cache is full and after: in a prompt, and token by token.

    Where prompts choose by top-k, no more of their tokens run than the contract says: then only token by token.
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
        except DynexportError as error:  # of an overflow, where the contract calls it one
            found.append(absent(f"full_caches/{name}", str(error)))
    if full_is_refused(manifest, row):
        found.append(_refused_when_full(executor, cases["steps"], tokens[length]))
    return found


def _refused_when_full(executor: Executor, case: Case, token: int) -> Measurement:
    """One token more than there is room for is an error."""
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
    """int64 [R, length]: decisions for every token to run wherever it may; on a path, in the first layer if it can."""
    if isinstance(manifest.routing, LayerRouting):
        return np.ones((len(manifest.routing.layers), length), np.int64)
    assert isinstance(manifest.routing, PathRouting)
    return np.repeat(path_through(manifest.routing, manifest.model.layers, 0)[:, None], length, axis=1)


def path_through(routing: PathRouting, layers: int, first: int) -> NDArray[np.int64]:
    """int64 [hops], the path that stays in a layer as long as there are hops, or goes on to those behind it."""
    hops = np.arange(routing.hops)
    if routing.reuse:
        return np.full_like(hops, first)
    path = np.where(hops < layers, (first + hops) % layers, -1)
    if routing.exit and routing.hops > layers and routing.min_hops <= layers:
        path[layers] = layers  # to leave is a choice even then
    return path


def _certain(answer: Answer) -> Answer:
    """Routes that nobody had a choice about: a decision that differs is no near-tie."""
    assert answer.routes is not None
    margin = np.full_like(answer.routes.margin, np.inf)
    return replace(answer, routes=replace(answer.routes, margin=margin))


def prompts_alone_and_together(
    executor: Executor, oracle: Oracle, prompts: Sequence[Prompt], rows: int
) -> list[Measurement]:
    """Logits after every token of every prompt: each prompt alone, then the first ``rows`` as a right-padded batch."""
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
    """The engine generates in a right-padded batch; the reference scores what it generated, in one pass.

    Args:
        count: tokens to generate; fewer where the context ends before.
    """
    longest = max(map(len, prompts))
    count = min(count, row_limit(executor.manifest) - longest + 1)
    cache = executor.full_cache(len(prompts), longest + count, record=True)
    first = executor.prefill(cache, prompts, depth=depth, all_logits=True)
    # What is generated last is never fed.
    last = np.concatenate([logits[-1:] for logits in first])
    fed, later = generate(executor, cache, last, depth, count - 1)
    cases = [Case((*prompt, *tokens), ((0, len(prompt)),), depth) for prompt, tokens in zip(prompts, fed, strict=True)]
    found = Run([np.concatenate(parts) for parts in zip(first, later, strict=True)], routes(cache))
    expected = answered(oracle.answers(cases))
    return compared(f"greedy/{depth.name}", "reference", executor, cases, expected, found, last=count)


def second_turn(executor: Executor, oracle: Oracle, prompts: Sequence[Prompt], depth: Depth) -> list[Measurement]:
    """A prompt, generated tokens, a further prompt, generated tokens."""
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
    """A row beside others is what it is alone, and to the last bit what it is beside others of the same lengths.

    Kernels may round differently for another batch size; for the same, a neighbour's tokens may change nothing.
    """
    cases = _forced(executor, prompts, depth)
    together, single = run(executor, cases), [run(executor, [case]) for case in cases]
    alone = Run([one.logits[0] for one in single], [row for one in single for row in one.decided])
    vocabulary = executor.manifest.model.vocab_size
    others = [Case(tuple((t + 1) % vocabulary for t in case.tokens), case.prompted, depth) for case in cases]
    among_others = [replay(executor, [*others[:i], case, *others[i + 1 :]])[i] for i, case in enumerate(cases)]
    exact = compare_bits(together.logits, among_others)
    return [
        *compared(f"batch_isolation/{depth.name}", "consistency", executor, cases, alone, together),
        Measurement(f"neighbours/{depth.name}", "exact", exact, skips(executor, depth)),
    ]


def ended_rows(executor: Executor, prompts: Sequence[Prompt], depth: Depth) -> Measurement:
    """Rows that have ended, or have not gone on yet, leave nothing behind: each gives what it gives among live ones.

    The first row goes on later than the others, which then have ended.
    """
    cases = _forced(executor, prompts, depth)
    together = run(executor, cases)
    steps = len(cases[0].tokens) - cases[0].prompted[0][1]
    # With room for entries that should not be.
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
    """A prompt at once gives what its tokens give one by one, in every layer."""
    full = executor.manifest.full
    at_once = run(executor, [Case(tuple(prompt), ((0, len(prompt)),), full)])
    one_by_one = [Case(tuple(prompt), ((0, 1),), full)]
    return compared("single_steps", "consistency", executor, one_by_one, at_once, run(executor, one_by_one))


def chunked_prefill(executor: Executor, prompt: Prompt) -> list[Measurement]:
    """A prompt at once gives what it gives in pieces."""
    cases = [Case(tuple(prompt), ((0, len(prompt)),), executor.manifest.full)]
    at_once = run(executor, cases, chunk=len(prompt))
    found: list[Measurement] = []
    for chunk in CHUNKS:
        if chunk < len(prompt):
            pieces = run(executor, cases, chunk=chunk)
            found += compared(f"chunked_prefill/{chunk}", "consistency", executor, cases, at_once, pieces, chunk=chunk)
    return found


def ratio_change(executor: Executor, fresh: Executor, prompts: Sequence[Prompt], depth: Depth) -> Measurement:
    """After a request at full depth, on its cache, another gives to the last bit what it gives on a new executor.

    Args:
        fresh: nothing has run on it.
        prompts: of the first request and of the one that is compared.
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
    """The prompts, each begun anew as if that had been generated: by as many tokens in every row."""
    fed = min(_STEPS, row_limit(executor.manifest) - max(map(len, prompts)))
    return [
        Case(tuple(np.resize(prompt, len(prompt) + fed).tolist()), ((0, len(prompt)),), depth) for prompt in prompts
    ]
