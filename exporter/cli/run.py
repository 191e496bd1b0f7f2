"""``dynexport run``: generate text with a bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dynexport.exporter.cli.arguments import (
    backend_option,
    bundle_argument,
    depth_option,
    numbers,
    settings,
    threads_option,
    trust_option,
    weights_option,
)
from dynexport.exporter.cli.describe import kept_text, not_trained
from dynexport.exporter.cli.output import Output, json_option
from dynexport.exporter.cli.prompts import given_prompt, utf8
from dynexport.exporter.cli.run_batch import batch_options, run_batch, take_batch
from dynexport.exporter.cli.sampling_options import chosen_sampling, given_fields, sampling_options
from dynexport.exporter.cli.shown import Shown
from dynexport.exporter.cli.speculation_options import asked_speculation, speculation_options
from dynexport.exporter.cli.talk import talk
from dynexport.exporter.cli.timings import Timings
from dynexport.exporter.trace import RowDepth, Token, Trace, TraceFile, look
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.engines.registry import RunBackend, Weights
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.kv_cache import STEP
from dynexport.runtime.generation.conversation import Conversation
from dynexport.runtime.generation.generation_config import recommended_by
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.sampling import Sampling


@click.command(
    epilog="""\b
Examples:
  dynexport run smollm2 --prompt "Once upon a time" --speedup 1
  dynexport run smollm2 --chat --prompt "What is the capital of France?" --system "Answer briefly."
  dynexport run smollm2 --chat
  dynexport run qwen3 --chat --prompt-file question.txt --template-var enable_thinking=false
  dynexport run smollm2 --prompt-file story.txt --temperature 0.7 --top-p 0.9
  dynexport run smollm2 --ids 1,2,3 --max-new-tokens 16 --json -
  dynexport run smollm2 --prompt "Once upon a time" --stats --weights mapped
  dynexport run smollm2 --chat --prompt-file quote.txt --speculate --stats
  dynexport run smollm2 --prompt "Once upon a time" --trace trace.png --trace trace.html
  dynexport run for-tensorrt --prompt "Once upon a time" --backend tensorrt-rtx
  dynexport run smollm2 --input requests.jsonl -o answers.jsonl"""
)
@bundle_argument
@click.option(
    "--prompt", callback=utf8, help="Text to continue, '-' for standard input; with --chat, a message to answer."
)
@click.option(
    "--prompt-file", type=click.Path(path_type=Path), help="A file or pipe with the prompt; '-' for standard input."
)
@click.option("--ids", metavar="1,2,3", help="Token ids to continue.")
@click.option("--chat", is_flag=True, help="Use the chat template; without a prompt, chat until the end of input.")
@click.option("--system", callback=utf8, help="With --chat: the system message.")
@click.option(
    "--template-var",
    "variables",
    metavar="NAME=VALUE",
    callback=utf8,
    multiple=True,
    help="With --chat: a variable of the chat template, as JSON or text, such as enable_thinking=false; may be given "
    "several times.",
)
@depth_option("A ratio of the bundle; 1 is full depth.  [default: the first that the model was trained for, else 1]")
@click.option(
    "--max-new-tokens", type=int, default=128, show_default=True, help="Maximum number of tokens to generate."
)
@sampling_options
@speculation_options
@click.option("--stop", callback=utf8, multiple=True, help="Stop at this text; may be given several times.")
@click.option(
    "--trace",
    "traces",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Write which token ran which layer, as .png, .html or .json; may be given several times.",
)
@click.option("--stats", is_flag=True, help="Show the times of loading, of the first token and of the others.")
@batch_options
@backend_option
@weights_option
@trust_option
@threads_option
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    ids: str | None,
    chat: bool,
    system: str | None,
    variables: tuple[str, ...],
    depth: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    traces: tuple[Path, ...],
    stats: bool,
    backend: RunBackend,
    weights: Weights,
    trust_engines: bool,
    threads: int,
    json_path: str | None,
    **others: Any,
) -> None:
    """Generate text with BUNDLE and stream it.

    Without --prompt, --prompt-file, --ids, --chat and --input, the prompt is read from a pipe on standard input.

    With --input, answer a file of requests in the form of OpenAI's batches. A run that was stopped or killed goes on
    when the same command runs again.
    """
    timings = Timings(bundle)
    speculate, draft = others.pop("speculate"), others.pop("draft")
    batch, sampling_fields = take_batch(others)
    if batch is not None:
        run_batch(bundle, batch, backend, threads, json_path, trust_engines=trust_engines, weights=weights)
        return
    _check_sources(prompt, prompt_file, ids, chat=chat)
    template_variables = _template_variables(variables)
    if not chat and (system is not None or variables):
        raise click.UsageError("--system and --template-var: expected with --chat, found without")
    out = Output(json_path)
    files = [TraceFile(path) for path in traces]
    text = given_prompt(prompt, prompt_file, from_pipe=ids is None and not chat)
    if text is None and ids is None and not chat:
        raise click.UsageError(_SOURCES)
    talking = chat and text is None
    if talking and (traces or stats):
        option = "--trace" if traces else "--stats"
        raise click.UsageError(f"{option}: expected --prompt or --ids beside it, found a conversation")
    given = given_fields(sampling_fields)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    recommended = recommended_by(opened)
    sampling = chosen_sampling(out, recommended, given)
    keep = opened.depth(depth)
    _say_ratio(out, opened, keep, asked=depth is not None)
    model = Model(opened, threads, backend=backend, weights=weights)
    if template_variables and (unused := model.text.unused_variables(template_variables)):
        out.warn(f"--template-var {', '.join(unused)}: the chat template reads no such variable")
    how: dict[str, Any] = {
        "depth": keep,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "speculation": asked_speculation(opened, speculate, draft, keep),
        "stop": (*stop, *(recommended.stop if model.text.has_tokenizer else ())),
    }
    settled = _settled(out, keep, sampling)
    if talking:
        _talk(out, Conversation(model, system, template_variables), how, settled)
        return
    tokens = _tokens(model, text, ids, _messages(system, text) if chat else None, template_variables)
    _warn_of_two_beginnings(out, opened.manifest.tokens.bos if text is not None else None, tokens)
    as_ids = not model.text.has_tokenizer or ids is not None
    shown = _answer(out, model, tokens, {**how, "chat": chat}, settled, files, timings, as_ids=as_ids)
    if stats:
        out.note(timings.text())
    if stats and how["speculation"] is not None:
        out.note(shown.drafts_text())


def _settled(out: Output, depth: Depth, sampling: Sampling) -> dict[str, Any]:
    """Return the report's fields about the settings of generation."""
    return {
        "speedup": depth.name,
        "layers": list(depth.keep),
        "trained": depth.trained,
        "sampling": asdict(sampling),
        "warnings": out.warnings,
    }


def _answer(
    out: Output,
    model: Model,
    tokens: list[int],
    how: Mapping[str, Any],
    settled: Mapping[str, Any],
    files: list[TraceFile],
    timings: Timings,
    *,
    as_ids: bool,
) -> Shown:
    """Generate after one prompt, stream the output, and write the report; return what was shown.

    Args:
        out: output of the command.
        model: the model.
        tokens: token ids of the prompt.
        how: arguments of ``Model.stream`` except the prompt and the cache.
        settled: the report's fields about the settings.
        files: trace files to write.
        timings: takes the times.
        as_ids: whether to show token ids instead of text.
    """
    longest = len(tokens) + max(0, how["max_new_tokens"])
    # A bundle with routers reports their decisions even without a trace.
    record = bool(files) or model.bundle.manifest.routing is not None
    cache = model.executor.full_cache(1, longest, record=record, room=len(tokens) + STEP)
    start = time.perf_counter()
    shown = Shown()
    stream = model.stream([tokens], cache=cache, **how)
    model.executor.load(how["depth"])
    timings.loaded()
    shown.show(out, stream, as_ids=as_ids, on_token=timings.token)
    seconds = time.perf_counter() - start
    report = {**shown.report(), "prompt_ids": tokens, **settled, "seconds": seconds, "timings": timings.report()}
    if cache.logs is not None:
        report |= _decided(out, files, model, model.executor.reader.joined(cache.logs[0]), report)
    out.report(report)
    return shown


def _decided(
    out: Output, files: list[TraceFile], model: Model, decisions: Decisions, report: Mapping[str, Any]
) -> dict[str, Any]:
    """Show the routing decisions and write the traces; return the report's fields about them."""
    routing = model.bundle.manifest.routing
    depth = RowDepth.of(decisions, routing)
    told: dict[str, Any] = {}
    if depth.routed:
        ran, overflow = look.routed(depth.routed)
        out.say(f"{ran}; {look.deep(depth.layers_per_token, depth.layers)}; {overflow}")
        told["depth"] = depth.model_dump()
    if depth.turned_away:
        out.warn(
            f"tokens were turned away {depth.turned_away} times because a layer was full; see convert --layer-capacity"
        )
        told["turned_away"] = depth.turned_away
    if files:
        ids = [*report["prompt_ids"], *report["ids"]][: depth.tokens]  # the last generated token was not processed
        tokens = Token.sequence(ids, model.text, len(report["prompt_ids"]))
        strategy = model.bundle.manifest.contract.strategy
        trace = Trace.of(decisions, routing, tokens, strategy=strategy, speedup=report["speedup"])
        for file in files:
            file.write(trace)
            out.say(f"trace: {file.path}")
    return told


def _warn_of_two_beginnings(out: Output, bos: int | None, tokens: Sequence[int]) -> None:
    if bos is not None and tokens[:2] == [bos, bos]:
        out.warn(f"the prompt begins with token {bos} twice; the tokenizer adds one, so remove yours")


_SOURCES = (
    "expected one of --prompt TEXT, --ids 1,2,3 or --chat (or --chat with --prompt); --prompt-file FILE or a pipe can "
    "take the place of --prompt"
)


def _check_sources(prompt: str | None, path: Path | None, ids: str | None, *, chat: bool) -> None:
    if sum(source is not None for source in (prompt, path, ids)) > 1 or (chat and ids is not None):
        raise click.UsageError(_SOURCES)


def _template_variables(options: Sequence[str]) -> dict[str, Any]:
    variables = settings(options, "--template-var")
    for name, value in variables.items():
        if value in ("True", "False", "None"):  # a template would read these words as text
            json_value = {"True": "true", "False": "false", "None": "null"}[value]
            raise click.BadParameter(f"{name}: expected JSON, {json_value}, found {value}", param_hint="--template-var")
    return variables


def _say_ratio(out: Output, bundle: Bundle, keep: Depth, *, asked: bool) -> None:
    """Warn about a ratio that the model was not trained for; note it if full depth is used for that reason."""
    if warning := not_trained(bundle.manifest, [keep]):
        out.warn(warning)
    if bundle.manifest.depths and not asked and len(keep.keep) == bundle.manifest.model.layers:
        ratios = ", ".join(f"{depth.name} ({kept_text(bundle.manifest, depth)})" for depth in bundle.manifest.depths)
        out.note(
            f"at full depth, as the checkpoint declares no ratio that it was trained for; --speedup takes {ratios}"
        )


def _messages(system: str | None, prompt: str | None) -> list[dict[str, str]]:
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": prompt or ""}]


def _tokens(
    model: Model,
    prompt: str | None,
    ids: str | None,
    messages: list[dict[str, str]] | None,
    variables: dict[str, Any],
) -> list[int]:
    if ids is not None:
        return numbers(ids, "--ids")
    if not prompt:
        raise DynexportError("--prompt: expected text, found none")
    if messages is not None:
        return model.text.chat(messages, variables=variables)
    return model.text.encode(prompt)


def _talk(out: Output, conversation: Conversation, how: dict[str, Any], settled: dict[str, Any]) -> None:
    """Run a conversation on standard input; the report is written even if it is interrupted."""
    turns: list[Shown] = []

    def answer(message: str) -> None:
        turns.append(Shown())
        turns[-1].show(out, conversation.say(message, **how), as_ids=False)
        if turns[-1].finish_reason == "length" and conversation.is_full:
            out.warn(f"the context of {conversation.context} tokens is full: the answer ends here")

    try:
        talk(out, answer)
    finally:
        answered = [turn.report() for turn in turns if turn.ids]
        out.report({"messages": conversation.messages, "turns": answered, **settled})
