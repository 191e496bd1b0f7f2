"""Load a bundle and generate with it: text or token ids in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack, overload

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind, checked_list, is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.engines.registry import RunBackend, Weights
from dynexport.runtime.execution.batch import CHUNK, EvenChunks, Tokens
from dynexport.runtime.execution.checking import checked_chunk
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import STEP, KvCache
from dynexport.runtime.generation.constraint import Constraint
from dynexport.runtime.generation.request import Generation, Request
from dynexport.runtime.generation.sampler import RowSampler
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.generation.speculation import Speculation, Speculators
from dynexport.runtime.generation.stream import Stream, run_requests
from dynexport.runtime.text.text import NO_VARIABLES, Text

Array = np.ndarray
Prompt: TypeAlias = str | Tokens
WantedDepth: TypeAlias = str | float | Depth | None
_GREEDY = Sampling()
_DEPTHS = str | float | int | Depth | None
_MOST_CHOICES = 128


class Options(TypedDict, total=False):
    """The options of a generation.

    Attributes:
        max_new_tokens: the largest number of new tokens per row, 128 by default; the end of the context may come first.
        sampling: one for all prompts or one per prompt; greedy by default. A row's tokens do not depend on other rows.
        depth: one for all prompts or one per prompt: a ratio or name that the bundle declares, "full", or a result of
            ``Bundle.depth``; None as for ``Bundle.depth``.
        stop: strings that end a row; they are not part of its text.
        chat: true for an answer in a chat, which also ends at the manifest's ``turn_end`` tokens.
        chunk: the largest number of a prompt's tokens in one call, 1,024 by default; a server has
            ``EvenChunks``.
        schema: a JSON schema that every row's text fulfils, unless ``max_new_tokens`` or ``stop`` ends it earlier.
        stop_token_ids: ids that end a row, in addition to the model's; they are not part of its text.
        speculation: how next tokens are drafted; None drafts none. The tokens are the same, but for rounding where two
            are equally probable.
    """

    max_new_tokens: int
    sampling: Sampling | Sequence[Sampling]
    depth: WantedDepth | Sequence[WantedDepth]
    stop: Sequence[str]
    chat: bool
    chunk: int | EvenChunks
    schema: Mapping[str, Any] | None
    stop_token_ids: Sequence[int]
    speculation: Speculation | None


def load(
    bundle: str | Path,
    *,
    threads: int | None = None,
    backend: RunBackend = "onnxruntime",
    trust_engines: bool = False,
    weights: Weights = "packed",
) -> Model:
    """Load a bundle for generation.

    Args:
        bundle: the bundle's directory.
        threads: intra-op threads of ONNX Runtime; None lets it take one per physical core.
        backend: the backend that runs the graphs: "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx".
        trust_engines: true lets TensorRT load engines that were built on another machine.
        weights: "packed" rearranges the weights at load for the fastest steps; "mapped" uses those of an fp32 bundle as
            they lie in the file: they load in no time, and processes share them.

    Raises:
        DynexportError: when the directory is not a bundle, was changed after the conversion, or cannot run on this
            backend or machine.
    """
    return Model(Bundle.open(bundle, trust_engines=trust_engines), threads, backend=backend, weights=weights)


class Model:
    """A loaded bundle that generates text.

    Threads may share a model, and several streams may run at a time; they do not change each other's results.

    Attributes:
        bundle: the opened bundle.
        executor: the executor that runs the bundle's graphs.
        text: the bundle's tokenizer and chat template.

    Args:
        bundle: an opened bundle.
        threads: as for ``load``.
        backend: as for ``load``.
        weights: as for ``load``.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        backend: RunBackend = "onnxruntime",
        weights: Weights = "packed",
    ) -> None:
        self.executor = Executor(bundle, threads, backend=backend, weights=weights)
        self.bundle, self.text, self._speculators = bundle, Text.of_bundle(bundle), Speculators()

    @overload
    def generate(self, prompts: str, **options: Unpack[Options]) -> Generation: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[int], **options: Unpack[Options]) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> list[Generation]: ...

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Unpack[Options]) -> Generation | list[Generation]:
        """Generate from one prompt, or from several in one batch.

        Args:
            prompts: text, token ids, or a list of either.
            options: see ``Options``.

        Returns:
            One generation for a single prompt; a list with one per prompt for a list.

        Raises:
            DynexportError: for a prompt that is empty, has unknown tokens or exceeds the context, or for an argument
                of another type or out of its range.
        """
        rows, single = self._rows(prompts)
        done = _collected([len(row) for row in rows], self._stream(rows, 1, **options))
        return done[0] if single else done

    def choices(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Generation]:
        """Generate n answers to one prompt, each with its own random draws; the prompt runs once.

        Args:
            prompt: text or token ids.
            n: number of answers, 1 to 128.
            options: see ``Options``.

        Raises:
            DynexportError: as for ``generate``.
        """
        n = checked_count("n", n, 1, _MOST_CHOICES)
        ids = self._ids(prompt)
        return _collected([len(ids)] * n, self._stream([ids], n, **options))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        cache: KvCache | None = None,
        held: Sequence[Tokens] = (),
        **options: Unpack[Options],
    ) -> Stream:
        """Generate token by token; the pieces of a step come row by row.

        Args:
            prompts: as for ``generate``.
            options: as for ``generate``.
            cache: a cache to continue from, with one acquired row per prompt; no other stream may use it until this one
                ends or is closed. None makes an empty cache.
            held: the token ids that ``cache`` holds, per row; penalties also count them.

        Raises:
            DynexportError: as for ``generate``.
        """
        rows, _ = self._rows(prompts)
        return self._stream(rows, 1, cache, held, **options)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, Any] = NO_VARIABLES,
        **options: Unpack[Options],
    ) -> Generation:
        """Generate the next answer in a chat.

        Args:
            messages: dictionaries with "role" and "content", as for transformers' ``apply_chat_template``.
            variables: more variables of the chat template, such as ``tools``.
            options: see ``Options``; ``chat`` is always true.

        Raises:
            DynexportError: as for ``generate``, for a bundle without a chat template, or for messages that the template
                refuses.
        """
        prompt = self.text.chat(messages, variables=variables)
        settled = Options(**options)
        settled["chat"] = True
        return self.generate(prompt, **settled)

    def _rows(self, prompts: Prompt | Sequence[Prompt]) -> tuple[list[Array], bool]:
        """Return the token ids of each prompt, int64 [n], and whether the caller gave one prompt without a list."""
        if isinstance(prompts, str):
            return [self._ids(prompts)], True
        listed = checked_list("prompts", prompts, "prompts, each text or a list of token ids")
        if not listed:
            raise DynexportError("prompts: expected at least one, found none")
        if all(is_integer(item) for item in listed):
            return [self._ids(listed)], True
        return [self._ids(item) for item in listed], False

    def _ids(self, prompt: Prompt) -> Array:
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else prompt
        return checked_ids("prompt", tokens, self.bundle.manifest.model.vocab_size)

    def _stream(
        self,
        rows: list[Array],
        n: int,
        cache: KvCache | None = None,
        held: Sequence[Tokens] = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] = _GREEDY,
        depth: WantedDepth | Sequence[WantedDepth] = None,
        stop: Sequence[str] = (),
        chat: bool = False,
        chunk: int | EvenChunks = CHUNK,
        schema: Mapping[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
        speculation: Speculation | None = None,
    ) -> Stream:
        """Stream n answers to each of the checked prompts."""
        max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
        samplings = _for_each("sampling", sampling, len(rows), Sampling, "a Sampling")
        wanted = _for_each("depth", depth, len(rows), _DEPTHS, "a ratio, a name or a Depth")
        depths = [self.depth(each) for each in wanted]
        if cache is None:
            longest = max(map(len, rows))
            cache = self.executor.full_cache(len(rows) * n, longest + max_new_tokens, room=longest + STEP)
        self.executor.check_cache(cache)
        if cache.rows != len(rows) * n:
            raise DynexportError(f"cache: expected {len(rows) * n} rows, one for each answer, found {cache.rows}")

        def request(place: int, index: int) -> Request:
            seen = [*held[place : place + 1], rows[place]]
            return self.request(
                seen,
                int(cache.positions[index]) + len(rows[place]),
                index=index,
                depth=depths[place],
                sampling=samplings[place],
                max_new_tokens=max_new_tokens,
                stop=stop,
                chat=chat,
                schema=schema,
                stop_token_ids=stop_token_ids,
            )

        requests = [[request(place, place * n + choice) for choice in range(n)] for place in range(len(rows))]
        checked_kind("speculation", speculation, Speculation | None, "a Speculation or None")
        chunk = checked_chunk(chunk)
        speculator = None if speculation is None else self._speculators.lent(self.executor, speculation)
        return Stream(run_requests(self.executor, cache, rows, requests, chunk, speculator=speculator, held=held))

    def request(
        self,
        seen: Sequence[Tokens],
        position: int,
        *,
        index: int,
        depth: Depth,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str],
        chat: bool,
        schema: Mapping[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Request:
        """Return the state of a request whose prompt is to run.

        Args:
            seen: the token ids of the context and the prompt, in order, for penalties.
            position: number of tokens in both.
            index: the request's index, which also selects one of a seed's random sequences.
            depth: a result of ``depth``.
            sampling: its sampling options.
            max_new_tokens: as for ``Options``.
            stop: as for ``Options``.
            chat: as for ``Options``.
            schema: as for ``Options``.
            stop_token_ids: as for ``Options``.

        Raises:
            DynexportError: for an argument of another type or out of its range.
        """
        checked_kind("chat", chat, bool, "true or false")
        stop = checked_list("stop", [stop] if isinstance(stop, str) else stop, "strings")
        if stop and not self.text.has_tokenizer:
            raise DynexportError(f"stop: expected a bundle with a tokenizer, found none in {self.bundle.path}")
        tokens, model = self.bundle.manifest.tokens, self.bundle.manifest.model
        more = checked_ids("stop_token_ids", stop_token_ids, model.vocab_size).tolist()
        eos = frozenset((*tokens.eos, *(tokens.turn_end if chat else ()), *more))
        constraint = None if schema is None else Constraint.json_schema(self.text, schema)
        sampler = RowSampler(sampling, seed_index=index, eos=eos, vocabulary=model.vocab_size, constraint=constraint)
        for ids in seen:
            sampler.see_prompt(ids)
        return Request(
            index,
            depth,
            sampler,
            self.text,
            stop=stop,
            eos=eos,
            max_new_tokens=max_new_tokens,
            room=model.max_length - position,
        )

    def depth(self, wanted: WantedDepth) -> Depth:
        """Return a declared depth; see ``Bundle.depth``."""
        return wanted if isinstance(wanted, Depth) else self.bundle.depth(wanted)


def _collected(prompt_tokens: Sequence[int], stream: Stream) -> list[Generation]:
    done = [Generation(count) for count in prompt_tokens]
    for piece in stream:
        done[piece.row].push(piece)
    return done


def _for_each(name: str, value: Any, count: int, kind: Any, what: str) -> list[Any]:
    """Return one value per prompt, from one value for all or from a sequence.

    Raises:
        DynexportError: for a value of another type, or a sequence of another length.
    """
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence | np.ndarray) or not all(isinstance(item, kind) for item in value):
        raise DynexportError(f"{name}: expected {what}, or one for each prompt, found {shown(value)}")
    if len(value) != count:
        raise DynexportError(f"{name}: expected one, or {count}, one for each prompt, found {len(value)}")
    return list(value)


__all__ = ["Model", "Options", "Prompt", "WantedDepth", "load"]
