"""The checks, from one pass at full depth to a conversation's second turn: each a function, and figures only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.parity.cases import Decisions, Prompt, generate, replay, routes
from dynexport.exporter.parity.constants import angle_differences, differences
from dynexport.exporter.parity.golden import GoldenRow
from dynexport.exporter.parity.metrics import FloatArray, Metrics, compare_bits, compare_logits, compare_routes
from dynexport.exporter.parity.reach import STEPS, LongRow, full_is_refused, row_limit
from dynexport.exporter.parity.thresholds import Kind
from dynexport.exporter.reference import Answer, Case, Oracle, RowPaths, RowRoutes
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import AnyContract, Mod, Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Speedup
from dynexport.runtime.execution.decoder import CHUNK
from dynexport.runtime.execution.decoders import AnyDecoder
from dynexport.runtime.execution.routes import TURNED_AWAY

CHUNKS = (1, 3, 16)
_ROUTES_OF: dict[Kind, Kind] = {"reference": "routes", "arithmetic": "arithmetic_routes"}
# Tokens fed one by one where generating is not what is checked.
_STEPS = 8


@dataclass(frozen=True)
class Measurement:
    """One check, not judged yet.

    Attributes:
        skipped: whether tokens ran in fewer than all layers.
        cases: what was compared with the reference, as one batch; empty in other checks.
        at: positions whose logits were; empty: all.
    """

    name: str
    kind: Kind
    metrics: Metrics
    skipped: bool = False
    cases: tuple[Case, ...] = ()
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Run:
    """What came of cases: per case float32 [length, vocab], and what routers decided, empty where there are none."""

    logits: Sequence[FloatArray]
    decided: Sequence[RowRoutes | RowPaths]


def kept_sets(bundle: Bundle) -> Measurement:
    """The manifest's kept sets are those that its contract asks for."""
    manifest = bundle.manifest
    wanted = strategies()[manifest.contract.strategy].speedups(manifest.contract, manifest.model.layers)
    by_name = {speedup.name: speedup for speedup in manifest.speedups}
    metrics: Metrics = {
        "identical": wanted == manifest.speedups,
        "differences": [
            f"kept set {speedup.name}: expected {list(speedup.keep)}, found "
            f"{list(by_name[speedup.name].keep) if speedup.name in by_name else 'none'}"
            for speedup in wanted
            if by_name.get(speedup.name) != speedup
        ],
        "contract": [list(speedup.keep) for speedup in wanted],
        "manifest": [list(speedup.keep) for speedup in manifest.speedups],
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


def golden_row(decoder: AnyDecoder, row: GoldenRow, there: tuple[Case, Answer] | None) -> list[Measurement]:
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
    return replayed(row.check, decoder, [case], [answer], at=row.positions, kind=kind)


def absent(name: str, difference: str) -> Measurement:
    """A check that should have been made, and was not."""
    return Measurement(name, "exact", {"identical": False, "differences": [difference]})


def long_rows(
    decoder: AnyDecoder, oracle: Oracle, row: LongRow, tokens: Prompt, ratios: Sequence[Speedup]
) -> list[Measurement]:
    """A row that goes as far as is worth its cost, at every ratio; logits of some positions, all decisions."""
    cases = [Case(tuple(tokens[: row.length]), ((0, row.prompt),), speedup) for speedup in ratios]
    answers = oracle.answers(cases, at=row.positions)
    found: list[Measurement] = []
    for case, answer in zip(cases, answers, strict=True):
        found += replayed(f"long/{case.speedup.name}", decoder, [case], [answer], at=row.positions)
    return found


def full_caches(decoder: AnyDecoder, oracle: Oracle, row: LongRow, tokens: Prompt) -> list[Measurement]:
    """Every token runs, whatever routers say, until a cache is full and after: in a prompt, and token by token.

    Where prompts choose by top-k, no more of their tokens run than the contract says: then only token by token.
    """
    manifest, full = decoder.manifest, decoder.bundle.speedup(1)
    contract, length = manifest.contract, row.length
    forced = everywhere(contract, manifest.model.layers, length)
    prompts = {"prompt": length, "steps": max(1, length - 2 * STEPS)}
    if isinstance(contract, Mod) and contract.prefill == "topk":
        prompts = {"steps": 1}
    cases = {name: Case(tuple(tokens[:length]), ((0, size),), full, forced) for name, size in prompts.items()}
    found: list[Measurement] = []
    for name, case in cases.items():
        at = tuple(sorted({*row.positions, case.prompted[0][1] - 1}))
        answer = _certain(oracle.answers([case], at=at)[0])
        try:
            found += replayed(f"full_caches/{name}", decoder, [case], [answer], at=at)
        except DynexportError as error:  # of an overflow, where the contract calls it one
            found.append(absent(f"full_caches/{name}", str(error)))
    if full_is_refused(manifest, row):
        found.append(_refused_when_full(decoder, cases["steps"], tokens[length]))
    return found


def _refused_when_full(decoder: AnyDecoder, case: Case, token: int) -> Measurement:
    """One token more than there is room for is an error."""
    assert case.forced is not None
    one_more = Case(
        (*case.tokens, token), case.prompted, case.speedup, np.pad(case.forced, ((0, 0), (0, 1)), mode="edge")
    )
    difference = f"expected an error for {len(one_more.tokens)} tokens that run in every layer, found none"
    try:
        replay(decoder, [one_more])
    except DynexportError:
        return Measurement("full_caches/refused", "exact", {"identical": True})
    return absent("full_caches/refused", difference)


def everywhere(contract: AnyContract, layers: int, length: int) -> NDArray[np.int64]:
    """int64 [R, length]: decisions for every token to run wherever it may; on a path, in the first layer if it can."""
    if isinstance(contract, Mod):
        return np.ones((len(contract.routed_layers), length), np.int64)
    assert isinstance(contract, Radial)
    return np.repeat(path_through(contract, layers, 0)[:, None], length, axis=1)


def path_through(contract: Radial, layers: int, first: int) -> NDArray[np.int64]:
    """int64 [max_steps], the path that stays in a layer as long as there are steps, or goes on to those behind it."""
    steps = np.arange(contract.max_steps)
    if contract.allow_reuse:
        return np.full_like(steps, first)
    path = np.where(steps < layers, (first + steps) % layers, -1)
    if contract.exit and contract.max_steps > layers and contract.min_steps <= layers:
        path[layers] = layers  # to leave is a choice even then
    return path


def _certain(answer: Answer) -> Answer:
    """Routes that nobody had a choice about: a decision that differs is no near-tie."""
    assert answer.routes is not None
    margin = np.full_like(answer.routes.margin, np.inf)
    return replace(answer, routes=replace(answer.routes, margin=margin))


def prompts_alone_and_together(
    decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt], rows: int
) -> list[Measurement]:
    """Logits after every token of every prompt: each prompt alone, then the first ``rows`` as a right-padded batch."""
    full = decoder.bundle.speedup(1)
    cases = [Case(tuple(prompt), ((0, len(prompt)),), full) for prompt in prompts]
    answers = oracle.answers(cases)
    found: list[Measurement] = []
    for case, answer in zip(cases, answers, strict=True):
        found += replayed(f"prompt/{len(case.tokens)}", decoder, [case], [answer])
    return found + replayed("prompt/batch", decoder, cases[:rows], answers[:rows])


def greedy(
    decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt], speedup: Speedup, count: int
) -> list[Measurement]:
    """The engine generates in a right-padded batch; the reference scores what it generated, in one pass.

    Args:
        count: tokens to generate; fewer where the context ends before.
    """
    longest = max(map(len, prompts))
    count = min(count, row_limit(decoder.manifest) - longest + 1)
    cache = decoder.cache(len(prompts), longest + count, record=True)
    first = decoder.prefill(cache, prompts, all_logits=True)
    # What is generated last is never fed.
    last = np.concatenate([logits[-1:] for logits in first])
    fed, later = generate(decoder, cache, last, speedup, count - 1)
    cases = [
        Case((*prompt, *tokens), ((0, len(prompt)),), speedup) for prompt, tokens in zip(prompts, fed, strict=True)
    ]
    found = _Run([np.concatenate(parts) for parts in zip(first, later, strict=True)], routes(decoder, cache))
    expected = _answered(oracle.answers(cases))
    return _compared(f"greedy/{speedup.name}", "reference", decoder, cases, expected, found, last=count)


def second_turn(decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt], speedup: Speedup) -> list[Measurement]:
    """A prompt, generated tokens, a further prompt, generated tokens."""
    room = row_limit(decoder.manifest) - sum(map(len, prompts))
    steps = min(_STEPS, room // len(prompts))
    cache = decoder.cache(1, sum(map(len, prompts)) + steps * len(prompts), record=True)
    tokens: list[int] = []
    prompted = []
    found: list[FloatArray] = []
    for prompt in prompts:
        prompted.append((len(tokens), len(tokens) + len(prompt)))
        logits = decoder.prefill(cache, [prompt], all_logits=True)[0]
        fed, later = generate(decoder, cache, logits[-1:], speedup, steps)
        tokens += [*prompt, *fed[0]]
        found += [logits, later[0]]
    cases = [Case(tuple(tokens), tuple(prompted), speedup)]
    expected, own = _answered(oracle.answers(cases)), _Run([np.concatenate(found)], routes(decoder, cache))
    return _compared(f"second_turn/{speedup.name}", "reference", decoder, cases, expected, own)


def batch_isolation(decoder: AnyDecoder, prompts: Sequence[Prompt], speedup: Speedup) -> list[Measurement]:
    """A row beside others is what it is alone, and to the last bit what it is beside others of the same lengths.

    Kernels may round differently for another batch size; for the same, a neighbour's tokens may change nothing.
    """
    cases = _forced(decoder, prompts, speedup)
    together, single = _run(decoder, cases), [_run(decoder, [case]) for case in cases]
    alone = _Run([run.logits[0] for run in single], [row for run in single for row in run.decided])
    vocabulary = decoder.manifest.model.vocab_size
    others = [Case(tuple((t + 1) % vocabulary for t in case.tokens), case.prompted, speedup) for case in cases]
    among_others = [replay(decoder, [*others[:i], case, *others[i + 1 :]])[i] for i, case in enumerate(cases)]
    exact = compare_bits(together.logits, among_others)
    return [
        *_compared(f"batch_isolation/{speedup.name}", "consistency", decoder, cases, alone, together),
        Measurement(f"neighbours/{speedup.name}", "exact", exact, _skips(decoder, speedup)),
    ]


def ended_rows(decoder: AnyDecoder, prompts: Sequence[Prompt], speedup: Speedup) -> Measurement:
    """Rows that have ended, or have not gone on yet, leave nothing behind: each gives what it gives among live ones.

    The first row goes on later than the others, which then have ended.
    """
    cases = _forced(decoder, prompts, speedup)
    together = _run(decoder, cases)
    steps = len(cases[0].tokens) - cases[0].prompted[0][1]
    # With room for entries that should not be.
    cache = decoder.cache(len(cases), max(len(case.tokens) for case in cases) + steps)
    told = [_wishes(row) for row in together.decided]
    starts = [case.prompted[0][1] for case in cases]
    begins = np.array([steps, *[0] * (len(cases) - 1)])
    forced = [row[:, :start] for row, start in zip(told, starts, strict=bool(told))]
    given = [case.tokens[:start] for case, start in zip(cases, starts, strict=True)]
    parts = [list(rows) for rows in decoder.prefill(cache, given, all_logits=True, forced=forced or None)]
    for now in range(2 * steps):
        live = (begins <= now) & (now < begins + steps)
        places = np.add(starts, np.clip(now - begins, 0, steps - 1)).tolist()
        tokens = [case.tokens[place] for case, place in zip(cases, places, strict=True)]
        wish = np.stack([row[:, place] for row, place in zip(told, places, strict=True)], axis=1) if told else None
        logits = decoder.step(cache, tokens, speedup, live, forced=wish)
        for row in np.flatnonzero(live):
            parts[row].append(logits[row])
    metrics = compare_logits(together.logits, [np.stack(rows) for rows in parts])
    return Measurement(f"ended_rows/{speedup.name}", "consistency", metrics, _skips(decoder, speedup))


def single_steps(decoder: AnyDecoder, prompt: Prompt) -> list[Measurement]:
    """A prompt at once gives what its tokens give one by one, in every layer."""
    full = decoder.bundle.speedup(1)
    at_once = _run(decoder, [Case(tuple(prompt), ((0, len(prompt)),), full)])
    one_by_one = [Case(tuple(prompt), ((0, 1),), full)]
    return _compared("single_steps", "consistency", decoder, one_by_one, at_once, _run(decoder, one_by_one))


def chunked_prefill(decoder: AnyDecoder, prompt: Prompt) -> list[Measurement]:
    """A prompt at once gives what it gives in pieces."""
    cases = [Case(tuple(prompt), ((0, len(prompt)),), decoder.bundle.speedup(1))]
    at_once = _run(decoder, cases, chunk=len(prompt))
    found: list[Measurement] = []
    for chunk in CHUNKS:
        if chunk < len(prompt):
            pieces = _run(decoder, cases, chunk=chunk)
            found += _compared(f"chunked_prefill/{chunk}", "consistency", decoder, cases, at_once, pieces, chunk=chunk)
    return found


def ratio_change(decoder: AnyDecoder, fresh: AnyDecoder, prompts: Sequence[Prompt], speedup: Speedup) -> Measurement:
    """After a request at full depth, on its cache, another gives to the last bit what it gives on a new decoder.

    Args:
        fresh: nothing has run on it.
        prompts: of the first request and of the one that is compared.
    """
    before = _forced(decoder, prompts[:1], decoder.bundle.speedup(1))
    compared = _forced(decoder, prompts[1:2], speedup)
    slots = max(len(case.tokens) for case in (*before, *compared))
    cache = decoder.cache(1, slots)
    replay(decoder, before, cache=cache)
    cache.rewind()
    used = replay(decoder, compared, cache=cache)
    new = replay(fresh, compared, cache=fresh.cache(1, slots))
    return Measurement(f"ratio_change/{speedup.name}", "exact", compare_bits(new, used), _skips(decoder, speedup))


def replayed(
    name: str,
    decoder: AnyDecoder,
    cases: Sequence[Case],
    answers: Sequence[Answer],
    *,
    at: tuple[int, ...] = (),
    kind: Kind = "reference",
) -> list[Measurement]:
    """Run cases through the engine and compare with what the reference answers to them."""
    return _compared(name, kind, decoder, cases, _answered(answers), _run(decoder, cases, at=at), at=at)


def _run(decoder: AnyDecoder, cases: Sequence[Case], *, chunk: int = CHUNK, at: Sequence[int] = ()) -> _Run:
    """The engine left to its own decisions."""
    cache = decoder.cache(len(cases), max(len(case.tokens) for case in cases), record=True)
    return _Run(replay(decoder, cases, cache=cache, chunk=chunk, at=at), routes(decoder, cache))


def _answered(answers: Sequence[Answer]) -> _Run:
    return _Run([row.logits for row in answers], [row.routes for row in answers if row.routes is not None])


def _compared(
    name: str,
    kind: Kind,
    decoder: AnyDecoder,
    cases: Sequence[Case],
    expected: _Run,
    found: _Run,
    *,
    last: int = 0,
    chunk: int = CHUNK,
    at: tuple[int, ...] = (),
) -> list[Measurement]:
    """Logits, and where layers are routed the decisions.

    A row with another decision than the expected has other logits from there on, however exact the arithmetic: such
    rows run once more with the expected routes, so that numeric errors and decisions are told apart.

    Args:
        found: what these cases gave on this decoder.
        last: compare only so many last positions; 0: as many as are expected.
        chunk: prompts went in pieces of this many tokens.
        at: positions that were wanted; empty: all.
    """
    skipped = _skips(decoder, cases[0].speedup)
    logits, measured = found.logits, []
    if expected.decided:
        told, decided = expected.decided, found.decided
        routes_kind = _ROUTES_OF.get(kind, "own_routes")
        measured.append(Measurement(f"routes/{name}", routes_kind, compare_routes(told, decided), skipped))
        differ = [bool((a.decisions != b.decisions).any()) for a, b in zip(told, decided, strict=True)]
        if any(differ):
            again = replay(decoder, cases, chunk=chunk, forced=[_wishes(row) for row in told], at=at)
            logits = [other if flipped else own for own, other, flipped in zip(logits, again, differ, strict=True)]
    wanted = [row[-last:] for row in expected.logits]
    candidate = [row[-len(like) :] for row, like in zip(logits, wanted, strict=True)]
    compared = tuple(cases) if kind == "reference" else ()
    return [*measured, Measurement(name, kind, compare_logits(wanted, candidate), skipped, compared, at)]


def _wishes(row: RowRoutes | RowPaths) -> Decisions:
    """The decisions to force, int64 or bool [R, tokens]; what a full layer made of one is not among them."""
    return np.where(row.decisions == TURNED_AWAY, -1, row.decisions)


def _skips(decoder: AnyDecoder, speedup: Speedup) -> bool:
    return len(speedup.keep) < decoder.manifest.model.layers


def _forced(decoder: AnyDecoder, prompts: Sequence[Prompt], speedup: Speedup) -> list[Case]:
    """The prompts, each begun anew as if that had been generated: by as many tokens in every row."""
    fed = min(_STEPS, row_limit(decoder.manifest) - max(map(len, prompts)))
    return [
        Case(tuple(np.resize(prompt, len(prompt) + fed).tolist()), ((0, len(prompt)),), speedup) for prompt in prompts
    ]
