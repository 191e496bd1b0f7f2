"""Evaluate a bundle with the tasks of lm-eval: ``python -m dynexport.lm_eval --model dynexport``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.errors import DynexportError, require_module
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.generation.model import WantedDepth, load
from dynexport.runtime.generation.request import Generation
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.measure.likelihood import Likelihood, likelihoods
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.submit import answers, make_work
from dynexport.runtime.serving.work import Work
from dynexport.runtime.serving.worker import Worker

try:
    require_module("lm_eval", "lm-eval", "evaluate a bundle with its tasks")
except DynexportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}")

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

Ids = list[int]
_ROWS = 8  # with a batch size of "auto"
_NEW_TOKENS = 256  # lm-eval's own default
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class BundleLM(LM):
    """A bundle as a model of lm-eval.

    A context runs as a prompt and a continuation as generated tokens, so the depth and the routers have their effect.

    Args:
        bundle: the bundle's directory.
        depth: a ratio or name that the bundle declares, or "full"; None as for ``Bundle.depth``.
        threads: as for ``load``.
        backend: as for ``load``.
        trust_engines: as for ``load``.
        max_length: most tokens of a context and its continuation; None for the model's context.
        batch_size: number of texts that run together; "auto" for 8.
        max_batch_size: refused; ``batch_size`` says it.
        device: not used, as lm-eval gives "cuda:0" to every model; ``backend`` chooses.

    Raises:
        DynexportError: as for ``load``, and for an argument out of its range.
    """

    def __init__(
        self,
        bundle: str,
        *,
        depth: WantedDepth = None,
        threads: int | None = None,
        backend: RunBackend = "onnxruntime",
        trust_engines: bool = False,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise DynexportError(f"max_batch_size: expected none, found {max_batch_size}; give batch_size")
        self._model = load(str(bundle), threads=threads, backend=backend, trust_engines=trust_engines)
        self._depth = self._model.depth(depth)
        context = self._model.bundle.manifest.model.max_length
        self._most = checked_count("max_length", context if max_length is None else max_length, 2, context)
        self._rows = _ROWS if str(batch_size) == "auto" else _number("batch_size", batch_size)
        self._chat = False
        tokens = self._model.bundle.manifest.tokens
        begins = self._model.text.encode("")[:1]
        self._bos = tokens.bos if begins == [tokens.bos] else None
        self._prefix = next((each for each in (tokens.bos, *tokens.eos) if each is not None), None)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return, for each pair of a context and a continuation, its log likelihood and whether it is the greedy one.

        A context that is too long loses its beginning. An empty one is the begin token, or an end token without one.

        Raises:
            DynexportError: for a continuation that exceeds the context.
        """
        found = self._likelihoods([self._pair(*each.args) for each in requests], disable_tqdm)
        results = [(each.log_likelihood, each.greedy) for each in found]
        self._remember("loglikelihood", requests, results)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of each text, window by window.

        The first window begins with the begin token, or an end token without one, and the others with one token of
        the text; the last has as many tokens before it as fit.
        """
        pairs: list[tuple[Ids, Ids]] = []
        ends = []
        for each in requests:
            ids = self._encode(each.args[0], special=False)
            windows = get_rolling_token_windows(ids, self._first(), self._most, 1)
            pairs += map(make_disjoint_window, windows)
            ends.append(len(pairs))
        found = [each.log_likelihood for each in self._likelihoods(pairs, disable_tqdm)]
        results = [sum(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        self._remember("loglikelihood_rolling", requests, results)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a text after each context, which ends before the first of its stop strings; rows join and leave.

        A context that leaves too little room for the answer loses its beginning.

        Raises:
            DynexportError: for an option of generation that there is not, or a request that fails.
        """
        works = [self._work(*each.args) for each in requests]
        done = {work: Generation(len(work.prompt)) for work in works}
        worker = Worker(self._model, Settings(self._rows, self._most, queue=len(works) + 1))
        worker.start()
        try:
            bar = tqdm(total=len(works), desc="dynexport", disable=disable_tqdm)
            with bar, closing(answers(worker, *works)) as deliveries:
                for delivery in deliveries:
                    if delivery.failure is not None:
                        raise DynexportError(f"request {works.index(delivery.work)}: {delivery.failure.message}")
                    for answered in delivery.answered:
                        done[delivery.work].push(answered.piece)
                    bar.update(int(delivery.done))
        finally:
            worker.close()
        results = [each.text for each in done.values()]
        self._remember("generate_until", requests, results)
        return results

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval keeps requests that a chat template has made."""
        return f"dynexport-{self._model.bundle.path.name}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return "" for the bundle's own template. Raises DynexportError for another one's name."""
        if isinstance(chat_template, str):
            raise DynexportError(f"chat_template: expected the bundle's own, found {chat_template}")
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation. Raises DynexportError without a chat template."""
        self._chat = True
        return self._model.text.render(chat_history, add_generation_prompt)

    def _likelihoods(self, pairs: Sequence[tuple[Ids, Ids]], disable_tqdm: bool) -> list[Likelihood]:
        with tqdm(total=len(pairs), desc="dynexport", disable=disable_tqdm) as bar:
            return likelihoods(self._model.executor, pairs, depth=self._depth, rows=self._rows, progress=bar.update)

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Return the token ids of a context and of its continuation, which are tokenized together."""
        words = context.rstrip()
        if words:
            before = self._encode(words)  # spaces after it belong to the continuation's first token
            after = self._encode(context + continuation)[len(before) :]
        else:
            before, after = [self._first()], self._encode(context + continuation, special=False)
            after = after[1:] if after[:1] == before else after
        if len(after) > self._most:
            raise DynexportError(f"continuation: expected at most {self._most} tokens, found {len(after)}")
        room = self._most - max(0, len(after) - 1)
        return before[-room:], after

    def _encode(self, text: str, *, special: bool = True) -> Ids:
        """Return the token ids of a text, after one begin token if the tokenizer adds it and the text has none."""
        ids = self._model.text.encode(text, add_special_tokens=False)
        return [self._bos, *ids] if special and self._bos is not None and ids[:1] != [self._bos] else ids

    def _first(self) -> int:
        if self._prefix is None:
            raise DynexportError("context: expected text, found none, and the bundle has no begin or end token")
        return self._prefix

    def _work(self, context: str, options: Mapping[str, Any]) -> Work:
        settled = normalize_gen_kwargs(dict(options), _NEW_TOKENS)
        stop, new_tokens = settled.pop("until"), settled.pop("max_gen_toks")
        if settled.pop("do_sample", False):
            settled.setdefault("temperature", 1.0)
        if wrong := [name for name in settled if name not in _SAMPLING and (name, settled[name]) != ("num_beams", 1)]:
            raise DynexportError(f"{', '.join(wrong)}: expected one of {', '.join(_SAMPLING)}, found another option")
        sampling = Sampling(**{name: settled[name] for name in _SAMPLING if name in settled})
        if new_tokens >= self._most:
            raise DynexportError(f"max_gen_toks: expected less than {self._most}, found {new_tokens}")
        ids = self._encode(context)[-(self._most - new_tokens) :] or [self._first()]
        return make_work(
            self._model,
            ids,
            max_new_tokens=new_tokens,
            sampling=sampling,
            depth=self._depth,
            stop=[each for each in stop if each],
            chat=self._chat,
        )

    def _remember(self, kind: str, requests: Iterable[Any], results: Iterable[Any]) -> None:
        """Give results to lm-eval's cache."""
        for each, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, each.args, result)


def _number(name: str, value: int | str) -> int:
    if isinstance(value, str) and not value.isdecimal():
        raise DynexportError(f"{name}: expected a number or auto, found {value}")
    return checked_count(name, int(value))


register_model("dynexport")(BundleLM)


def main() -> None:
    """Run lm-eval's command line, with this model beside its own."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except DynexportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

__all__ = ["BundleLM"]
