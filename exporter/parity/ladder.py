"""The checks, from a single pass at full depth to a conversation's second turn; each one function, and figures only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.exporter.parity.cases import Case, Prompt, Score, generate, replay
from dynexport.exporter.parity.golden import GoldenRow
from dynexport.exporter.parity.metrics import FloatArray, Metrics, compare_bits, compare_logits
from dynexport.exporter.parity.thresholds import Kind
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.decoder import Decoder
from dynexport.runtime.manifest import Speedup

_CHUNKS = (1, 3, 16)
# Tokens fed one by one in checks that are about more than generating.
_STEPS = 8


@dataclass(frozen=True)
class Measurement:
    """One check, not judged yet.

    Attributes:
        cases: what was compared with the reference, as one batch; empty where it was compared with itself.
    """

    name: str
    kind: Kind
    metrics: Metrics
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


def golden_rows(decoder: Decoder, rows: Sequence[GoldenRow]) -> list[Measurement]:
    """What PyTorch computed when the bundle was made, row by row."""
    found = []
    for row in rows:
        case = Case(tuple(row.tokens.tolist()), ((0, row.prompt_length),), _speedup(decoder, row.speedup))
        logits = replay(decoder, [case])[0][-len(row.logits) :]
        name = f"golden/{row.speedup}/{row.prompt_length}"
        found.append(Measurement(name, "reference", compare_logits([row.logits], [logits]), (case,)))
    return found


def prompts_alone_and_together(decoder: Decoder, score: Score, prompts: Sequence[Prompt]) -> list[Measurement]:
    """Logits after every token of every prompt: each prompt alone, then all as one right-padded batch."""
    full = decoder.bundle.speedup(1)
    cases = [Case(tuple(prompt), ((0, len(prompt)),), full) for prompt in prompts]
    expected = score(cases)
    found = []
    for case, logits in zip(cases, expected, strict=True):
        metrics = compare_logits([logits], replay(decoder, [case]))
        found.append(Measurement(f"prompt/{len(case.tokens)}", "reference", metrics, (case,)))
    if len(cases) > 1:
        metrics = compare_logits(expected, replay(decoder, cases))
        found.append(Measurement("prompt/batch", "reference", metrics, tuple(cases)))
    return found


def greedy(decoder: Decoder, score: Score, prompts: Sequence[Prompt], speedup: Speedup, count: int) -> Measurement:
    """The engine generates in a right-padded batch; the reference scores what it generated in one pass."""
    cache = decoder.cache(len(prompts), max(map(len, prompts)) + count)
    first = np.concatenate(decoder.prefill(cache, prompts))
    fed, later = generate(decoder, cache, first, speedup, count - 1)
    found = [np.concatenate([a[None], b]) for a, b in zip(first, later, strict=True)]
    cases = [
        Case((*prompt, *tokens), ((0, len(prompt)),), speedup) for prompt, tokens in zip(prompts, fed, strict=True)
    ]
    expected = [logits[-count:] for logits in score(cases)]
    metrics = compare_logits(expected, found)
    return Measurement(f"greedy/{speedup.name}", "reference", metrics, tuple(cases))


def second_turn(decoder: Decoder, score: Score, prompts: tuple[Prompt, Prompt], speedup: Speedup) -> Measurement:
    """A prompt, generated tokens, a further prompt that runs in every layer again, generated tokens."""
    slots = sum(map(len, prompts)) + 2 * _STEPS
    cache = decoder.cache(1, slots)
    tokens: list[int] = []
    prompted = []
    found: list[FloatArray] = []
    for prompt in prompts:
        prompted.append((len(tokens), len(tokens) + len(prompt)))
        logits = decoder.prefill(cache, [prompt], all_logits=True)[0]
        fed, later = generate(decoder, cache, logits[-1:], speedup, _STEPS)
        tokens += [*prompt, *fed[0]]
        found += [logits, later[0]]
    case = Case(tuple(tokens), tuple(prompted), speedup)
    metrics = compare_logits(score([case]), [np.concatenate(found)])
    return Measurement(f"second_turn/{speedup.name}", "reference", metrics, (case,))


def batch_isolation(decoder: Decoder, prompts: Sequence[Prompt], speedup: Speedup) -> list[Measurement]:
    """A row beside others is what it is alone, and exactly what it is beside other neighbours of the same lengths.

    Kernels that depend on the batch may round differently alone; beside other neighbours nothing may change.
    """
    cases = _forced(decoder, prompts, speedup)
    together = replay(decoder, cases)
    alone = [replay(decoder, [case])[0] for case in cases]
    vocabulary = decoder.manifest.model.vocab_size
    others = [Case(tuple((token + 1) % vocabulary for token in case.tokens), case.prompted, speedup) for case in cases]
    kept = [replay(decoder, [*others[:i], case, *others[i + 1 :]])[i] for i, case in enumerate(cases)]
    return [
        Measurement(f"batch_isolation/{speedup.name}", "consistency", compare_logits(alone, together)),
        Measurement(f"neighbours/{speedup.name}", "exact", compare_bits(together, kept)),
    ]


def single_steps(decoder: Decoder, prompt: Prompt) -> Measurement:
    """A prompt at once gives what its tokens give one by one at full depth."""
    full = decoder.bundle.speedup(1)
    at_once = replay(decoder, [Case(tuple(prompt), ((0, len(prompt)),), full)])
    stepped = replay(decoder, [Case(tuple(prompt), ((0, 1),), full)])
    return Measurement("single_steps", "consistency", compare_logits(at_once, stepped))


def chunked_prefill(decoder: Decoder, prompt: Prompt) -> list[Measurement]:
    """A prompt at once gives what it gives in pieces."""
    case = Case(tuple(prompt), ((0, len(prompt)),), decoder.bundle.speedup(1))
    at_once = replay(decoder, [case], chunk=len(prompt))
    return [
        Measurement(
            f"chunked_prefill/{chunk}",
            "consistency",
            compare_logits(at_once, replay(decoder, [case], chunk=chunk)),
        )
        for chunk in _CHUNKS
        if chunk < len(prompt)
    ]


def ratio_change(decoder: Decoder, fresh: Decoder, prompts: tuple[Prompt, Prompt], speedup: Speedup) -> Measurement:
    """After a request at another depth, on its cache, a request gives exactly what it gives on a new decoder."""
    first = _forced(decoder, prompts[:1], decoder.bundle.speedup(1))
    second = _forced(decoder, prompts[1:], speedup)
    slots = len(first[0].tokens) + len(second[0].tokens)
    cache = decoder.cache(1, slots)
    replay(decoder, first, cache=cache)
    cache.rewind()
    used = replay(decoder, second, cache=cache)
    new = replay(fresh, second, cache=fresh.cache(1, slots))
    return Measurement(f"ratio_change/{speedup.name}", "exact", compare_bits(new, used))


def _forced(decoder: Decoder, prompts: Sequence[Prompt], speedup: Speedup) -> list[Case]:
    """The prompts, each over again as if generated: the same number of tokens in every row."""
    longest = max(map(len, prompts))
    fed = min(_STEPS, decoder.manifest.model.max_length - longest)
    return [
        Case(tuple(np.resize(prompt, len(prompt) + fed).tolist()), ((0, len(prompt)),), speedup) for prompt in prompts
    ]


def _speedup(decoder: Decoder, name: str) -> Speedup:
    return decoder.bundle.speedup(1 if name == "dense" else name)
