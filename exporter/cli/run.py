"""``dynexport run``: text from a bundle."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from dynexport.exporter.cli.arguments import backend_option, bundle_argument, numbers, threads_option, trust_option
from dynexport.exporter.cli.output import Output, json_option
from dynexport.exporter.trace import Depth, Token, Trace, TraceFile, look
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.conversation import Conversation
from dynexport.runtime.decoders import AnyCache
from dynexport.runtime.engines.opening import RunBackend
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.generate import Generator, Piece
from dynexport.runtime.sampling import Sampling


@click.command(
    epilog="""\b
Examples:
  dynexport run smollm2 --prompt "Once upon a time" --speedup 1
  dynexport run smollm2 --chat --prompt "What is the capital of France?" --speedup 1
  dynexport run smollm2 --chat
  dynexport run smollm2 --ids 1,2,3 --max-new-tokens 16 --json -
  dynexport run smollm2 --prompt "Once upon a time" --trace trace.png --trace trace.html
  dynexport run for-tensorrt --prompt "Once upon a time" --backend tensorrt-rtx"""
)
@bundle_argument
@click.option("--prompt", help="Text to continue; with --chat, a message to answer.")
@click.option("--ids", metavar="1,2,3", help="Token ids to continue.")
@click.option("--chat", is_flag=True, help="Use the chat template; without --prompt, talk until end of input.")
@click.option("--speedup", help="A declared ratio; 1 is full depth.  [default: the first of the bundle]")
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Stop after so many tokens.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens of this share.",
)
@click.option(
    "--top-k",
    type=int,
    default=0,
    show_default=True,
    help="Sample from so many likeliest tokens; 0 from all.",
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="Stop at this text; may be given several times.")
@click.option(
    "--trace",
    "traces",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Show which token ran in which layer, as .png, .html or .json; may be given several times.",
)
@backend_option
@trust_option
@threads_option
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    ids: str | None,
    chat: bool,
    speedup: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    traces: tuple[Path, ...],
    backend: RunBackend,
    trust_engines: bool,
    threads: int,
    json_path: str | None,
) -> None:
    """Generate with BUNDLE, streaming."""
    if (prompt is not None) + (ids is not None) + (chat and prompt is None) != 1 or (chat and ids is not None):
        raise click.UsageError("expected one of --prompt TEXT, --ids 1,2,3 or --chat (or --chat with --prompt)")
    if traces and chat and prompt is None:
        raise click.UsageError("--trace: expected --prompt or --ids beside it, found a conversation")
    out = Output(json_path)
    files = [TraceFile(path) for path in traces]
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    generator = Generator(Bundle.open(bundle, trust_engines=trust_engines), threads, backend=backend)
    if chat and prompt is None:
        _talk(out, generator, speedup, max_new_tokens, sampling)
        return
    tokens = _tokens(generator, prompt, ids, chat)
    cache = generator.decoder.cache(1, len(tokens) + max(0, max_new_tokens), record=bool(files))
    start = time.perf_counter()
    pieces = generator.stream(
        [tokens],
        speedup=speedup,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        cache=cache,
        chat=chat,
    )
    shown = _show(out, pieces, as_ids=not generator.text.has_tokenizer or ids is not None)
    seconds = time.perf_counter() - start
    keep = generator.bundle.speedup(speedup)
    report = {**shown, "prompt_ids": tokens, "speedup": keep.name, "layers": list(keep.keep), "seconds": seconds}
    depth = Depth.of(cache, generator.bundle.manifest)
    if depth.routed:
        _say_depth(out, depth)
        report["depth"] = depth.model_dump()
    if depth.turned_away:
        out.warn(f"full layers turned tokens away {depth.turned_away} times: see layer_capacity")
        report["turned_away"] = depth.turned_away
    if files:
        _trace(out, files, generator, cache, depth, report)
    out.report(report)


def _tokens(generator: Generator, prompt: str | None, ids: str | None, chat: bool) -> list[int]:
    if ids is not None:
        return numbers(ids, "--ids")
    if not prompt:
        raise DynexportError("--prompt: expected text, found none")
    if chat:
        return generator.text.chat([{"role": "user", "content": prompt}])
    return generator.text.encode(prompt)


def _show(out: Output, pieces: Iterable[Piece], *, as_ids: bool) -> dict[str, Any]:
    """Print tokens as they come; what they were."""
    ids: list[int] = []
    text, reason = "", None
    for piece in pieces:
        shown = (f",{piece.token}" if ids else str(piece.token)) if as_ids else piece.text
        out.stream(shown)
        ids.append(piece.token)
        text += piece.text
        reason = piece.finish_reason
    out.stream("\n")
    return {"ids": ids, "text": text, "finish_reason": reason}


def _say_depth(out: Output, depth: Depth) -> None:
    """What the routers came to, in a line."""
    ran, overflow = look.routed(depth.routed)
    out.say(f"{ran}; {look.deep(depth.layers_per_token, depth.layers)}; {overflow}")


def _trace(
    out: Output, files: list[TraceFile], generator: Generator, cache: AnyCache, depth: Depth, report: dict[str, Any]
) -> None:
    """Write what was recorded of the tokens that were processed; the last generated one never was."""
    assert cache.logs is not None
    ids = [*report["prompt_ids"], *report["ids"]][: depth.tokens]
    trace = Trace.from_log(
        cache.logs[0],
        Token.sequence(ids, generator.text, len(report["prompt_ids"])),
        depth,
        strategy=generator.bundle.manifest.contract.strategy,
        speedup=report["speedup"],
    )
    for file in files:
        file.write(trace)
        out.say(f"trace: {file.path}")


def _talk(out: Output, generator: Generator, speedup: str | None, max_new_tokens: int, sampling: Sampling) -> None:
    """A conversation on standard input until its end; the report has all messages."""
    conversation = Conversation(generator)
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            break
        if line.strip():
            answer = conversation.say(line, speedup=speedup, max_new_tokens=max_new_tokens, sampling=sampling)
            _show(out, answer, as_ids=False)
    out.report({"messages": conversation.messages})
