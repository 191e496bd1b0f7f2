"""The checks, from one pass at full depth to a conversation's second turn: each a function, and figures only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.exporter.parity.cases import Prompt, generate, replay, routes
from dynexport.exporter.parity.golden import GoldenRow
from dynexport.exporter.parity.metrics import FloatArray, Metrics, compare_bits, compare_logits, compare_routes
from dynexport.exporter.parity.thresholds import Kind
from dynexport.exporter.reference import Answer, Case, Oracle, RowPaths, RowRoutes
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.contract import Mod
from dynexport.runtime.decoders import AnyCache, AnyDecoder
from dynexport.runtime.manifest import Speedup

_CHUNKS = (1, 3, 16)
# Tokens fed one by one where generating is not what is checked.
_STEPS = 8


@dataclass(frozen=True)
class Measurement:
    """One check, not judged yet.

    Attributes:
        skipped: whether tokens ran in fewer than all layers.
        cases: what was compared with the reference, as one batch; empty in other checks.
    """

    name: str
    kind: Kind
    metrics: Metrics
    skipped: bool = False
    cases: tuple[Case, ...] = ()


def kept_sets(bundle: Bundle) -> Measurement:
    """The manifest's kept sets are those that its contract asks for."""
    manifest = bundle.manifest
    wanted = strategies()[manifest.contract.strategy].speedups(manifest.contract, manifest.model.layers)
    metrics: Metrics = {
        "identical": wanted == manifest.speedups,
        "contract": [list(speedup.keep) for speedup in wanted],
        "manifest": [list(speedup.keep) for speedup in manifest.speedups],
    }
    return Measurement("kept_sets", "exact", metrics)


def prompts_compete(bundle: Bundle) -> bool:
    """Whether what a prompt's token does depends on the tokens after it: then a prompt in pieces is another prompt."""
    contract = bundle.manifest.contract
    return isinstance(contract, Mod) and contract.prefill == "topk"


def golden_row(decoder: AnyDecoder, row: GoldenRow) -> list[Measurement]:
    """What PyTorch computed when the bundle was made."""
    speedup = decoder.bundle.speedup(1 if row.speedup == "dense" else row.speedup)
    case = Case(tuple(row.tokens.tolist()), ((0, row.prompt_length),), speedup)
    return _replayed(f"golden/{row.speedup}/{row.prompt_length}", decoder, [case], [row.answer])


def prompts_alone_and_together(
    decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt], rows: int
) -> list[Measurement]:
    """Logits after every token of every prompt: each prompt alone, then the first ``rows`` as a right-padded batch."""
    full = decoder.bundle.speedup(1)
    cases = [Case(tuple(prompt), ((0, len(prompt)),), full) for prompt in prompts]
    answers = oracle.answers(cases)
    found: list[Measurement] = []
    for case, answer in zip(cases, answers, strict=True):
        found += _replayed(f"prompt/{len(case.tokens)}", decoder, [case], [answer])
    return found + _replayed("prompt/batch", decoder, cases[:rows], answers[:rows])


def greedy(
    decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt], speedup: Speedup, count: int
) -> list[Measurement]:
    """The engine generates in a right-padded batch; the reference scores what it generated, in one pass.

    Args:
        count: tokens to generate; fewer where the context ends before.
    """
    longest = max(map(len, prompts))
    count = min(count, decoder.manifest.model.max_length - longest + 1)
    cache = decoder.cache(len(prompts), longest + count, record=True)
    first = decoder.prefill(cache, prompts, all_logits=True)
    # What is generated last is never fed.
    last = np.concatenate([logits[-1:] for logits in first])
    fed, later = generate(decoder, cache, last, speedup, count - 1)
    cases = [
        Case((*prompt, *tokens), ((0, len(prompt)),), speedup) for prompt, tokens in zip(prompts, fed, strict=True)
    ]
    found = [np.concatenate(parts) for parts in zip(first, later, strict=True)]
    return _against_reference(f"greedy/{speedup.name}", decoder, cases, oracle.answers(cases), found, cache, count)


def second_turn(decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt], speedup: Speedup) -> list[Measurement]:
    """A prompt, generated tokens, a further prompt, generated tokens."""
    room = decoder.manifest.model.max_length - sum(map(len, prompts))
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
    answers = oracle.answers(cases)
    return _against_reference(f"second_turn/{speedup.name}", decoder, cases, answers, [np.concatenate(found)], cache)


def batch_isolation(decoder: AnyDecoder, prompts: Sequence[Prompt], speedup: Speedup) -> list[Measurement]:
    """A row beside others is what it is alone, and to the last bit what it is beside others of the same lengths.

    Kernels may round differently for another batch size; for the same, a neighbour's tokens may change nothing.
    """
    cases = _forced(decoder, prompts, speedup)
    together = replay(decoder, cases)
    alone = [replay(decoder, [case])[0] for case in cases]
    vocabulary = decoder.manifest.model.vocab_size
    others = [Case(tuple((t + 1) % vocabulary for t in case.tokens), case.prompted, speedup) for case in cases]
    among_others = [replay(decoder, [*others[:i], case, *others[i + 1 :]])[i] for i, case in enumerate(cases)]
    skipped = _skips(decoder, speedup)
    return [
        Measurement(f"batch_isolation/{speedup.name}", "consistency", compare_logits(alone, together), skipped),
        Measurement(f"neighbours/{speedup.name}", "exact", compare_bits(together, among_others), skipped),
    ]


def single_steps(decoder: AnyDecoder, prompt: Prompt) -> Measurement:
    """A prompt at once gives what its tokens give one by one, in every layer."""
    full = decoder.bundle.speedup(1)
    at_once = replay(decoder, [Case(tuple(prompt), ((0, len(prompt)),), full)])
    stepped = replay(decoder, [Case(tuple(prompt), ((0, 1),), full)])
    return Measurement("single_steps", "consistency", compare_logits(at_once, stepped))


def chunked_prefill(decoder: AnyDecoder, prompt: Prompt) -> list[Measurement]:
    """A prompt at once gives what it gives in pieces."""
    case = Case(tuple(prompt), ((0, len(prompt)),), decoder.bundle.speedup(1))
    at_once = replay(decoder, [case], chunk=len(prompt))
    return [
        Measurement(
            f"chunked_prefill/{chunk}", "consistency", compare_logits(at_once, replay(decoder, [case], chunk=chunk))
        )
        for chunk in _CHUNKS
        if chunk < len(prompt)
    ]


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


def _replayed(name: str, decoder: AnyDecoder, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Measurement]:
    """Run cases through the engine and compare."""
    cache = decoder.cache(len(cases), max(len(case.tokens) for case in cases), record=True)
    return _against_reference(name, decoder, cases, answers, replay(decoder, cases, cache=cache), cache)


def _against_reference(
    name: str,
    decoder: AnyDecoder,
    cases: Sequence[Case],
    answers: Sequence[Answer],
    found: list[FloatArray],
    cache: AnyCache,
    last: int = 0,
) -> list[Measurement]:
    """Logits, and where layers are routed the decisions.

    A row with another decision than the reference's has other logits from there on, however exact the arithmetic: such
    rows run once more with the reference's routes, so that numeric errors and decisions are told apart.

    Args:
        found: per case float32 [length, vocab].
        cache: which these were computed with, recording.
        last: compare only so many last positions; 0: as many as an answer has.
    """
    expected = [answer.logits[-last:] for answer in answers]
    skipped = _skips(decoder, cases[0].speedup)
    measured = []
    told = [answer.routes for answer in answers if answer.routes is not None]
    if told:
        decided: list[RowRoutes | RowPaths] = [*routes(decoder, cache)]
        measured.append(Measurement(f"routes/{name}", "routes", compare_routes(told, decided), skipped))
        if any((a.decisions != b.decisions).any() for a, b in zip(told, decided, strict=True)):
            again = replay(decoder, cases, forced=[row.decisions for row in told])
            found = [
                other if (a.decisions != b.decisions).any() else own
                for own, other, a, b in zip(found, again, told, decided, strict=True)
            ]
    candidate = [logits[-len(row) :] for logits, row in zip(found, expected, strict=True)]
    return [*measured, Measurement(name, "reference", compare_logits(expected, candidate), skipped, tuple(cases))]


def _skips(decoder: AnyDecoder, speedup: Speedup) -> bool:
    return len(speedup.keep) < decoder.manifest.model.layers


def _forced(decoder: AnyDecoder, prompts: Sequence[Prompt], speedup: Speedup) -> list[Case]:
    """The prompts, each begun anew as if that had been generated: by as many tokens in every row."""
    fed = min(_STEPS, decoder.manifest.model.max_length - max(map(len, prompts)))
    return [
        Case(tuple(np.resize(prompt, len(prompt) + fed).tolist()), ((0, len(prompt)),), speedup) for prompt in prompts
    ]
