"""``dynexport serve``: serve bundles over HTTP, with OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from dynexport.exporter.cli.arguments import backend_option, threads_option, trust_option, weights_option
from dynexport.exporter.cli.output import Output
from dynexport.exporter.cli.speculation_options import asked_speculation, speculation_options
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import read_plain
from dynexport.runtime.engines.registry import RunBackend, Weights
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.server import bind, require_packages
from dynexport.runtime.serving.http.server import serve as serve_http
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.metrics import Metrics
from dynexport.runtime.serving.settings import PREFIX_BYTES, Settings
from dynexport.runtime.serving.spans import Spans, otlp_provider
from dynexport.runtime.serving.watches import Watches
from dynexport.runtime.serving.worker import Worker

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DEFAULTS, _HTTP = Settings(), HttpSettings()


def _size(context: click.Context, option: click.Parameter, value: str) -> int:
    """Return a number of bytes from text such as 512M."""
    found = re.fullmatch(r"(\d{1,12})([KMG]?)(i?B)?", value.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"expected a number of bytes such as 512M or 2G, found {value!r:.40}")
    return int(found[1]) * _UNITS[found[2].upper()]


@click.command(
    epilog="""\b
Examples:
  dynexport serve smollm2
  dynexport serve smollm2 mod --port 8080 --threads 4 --max-rows 16
  dynexport serve smollm2 --prefix-cache 512M --api-key-file keys.txt
  dynexport serve smollm2 --speculate
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2@2", "messages": [{"role": "user", "content": "Hello"}]}'"""
)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--name", "names", multiple=True, help="A bundle's name in the API, in their order.  [default: directory]"
)
@click.option("--max-rows", type=int, default=_DEFAULTS.rows, show_default=True, help="Answers that run at a time.")
@click.option("--max-length", type=int, help="Most tokens of a prompt and its answer.  [default: the model's context]")
@click.option(
    "--chunk",
    type=int,
    default=_DEFAULTS.chunk,
    show_default=True,
    help="Tokens of a prompt's first chunk.",
)
@click.option("--queue", type=int, default=_DEFAULTS.queue, show_default=True, help="Requests that may wait.")
@click.option("--reserve", type=int, help="Tokens of all running requests together.  [default: rows times length]")
@click.option(
    "--prefix-cache",
    callback=_size,
    default=f"{PREFIX_BYTES >> 20}M",
    show_default=True,
    help="Memory for known prefixes; 0 for none.",
)
@speculation_options
@click.option(
    "--timeout", type=float, default=_HTTP.request_seconds, show_default=True, help="Seconds that a request may take."
)
@click.option("--max-body", callback=_size, default="4M", show_default=True, help="Largest body of a request.")
@click.option(
    "--drain-seconds",
    type=float,
    default=_HTTP.drain_seconds,
    show_default=True,
    help="Seconds that running requests get to finish after SIGTERM.",
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="A file with API keys, one per line.  [default: no keys]"
)
@click.option("--spans", is_flag=True, help="Send a span of each request by OpenTelemetry, set up by OTEL_ variables.")
@backend_option
@weights_option
@trust_option
@threads_option
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    names: tuple[str, ...],
    max_rows: int,
    max_length: int | None,
    chunk: int,
    queue: int,
    reserve: int | None,
    prefix_cache: int,
    speculate: str | None,
    draft: str | None,
    timeout: float,
    max_body: int,
    drain_seconds: float,
    api_key_file: Path | None,
    spans: bool,
    backend: RunBackend,
    weights: Weights,
    trust_engines: bool,
    threads: int,
) -> None:
    """Serve BUNDLES over HTTP with OpenAI's API, many requests at a time.

    A request chooses its depth by the field "depth" or by a model name such as smollm2@2. There is no TLS: put a proxy
    in front. Prompts and keys are never logged.
    """
    require_packages()
    out = Output(None)
    settings = Settings(max_rows, max_length, chunk, queue, reserve, prefix_cache)
    keys = _keys(api_key_file)
    if host not in ("127.0.0.1", "localhost", "::1") and not keys:
        out.warn(f"--host {host}: every machine that reaches it can use the models; set --api-key-file")
    bound, metrics, provider = bind(host, port), Metrics(), otlp_provider() if spans else None
    workers = {}
    for name, path in _named(bundles, names).items():
        model = Model(Bundle.open(path, trust_engines=trust_engines), threads, backend=backend, weights=weights)
        speculation = asked_speculation(model.bundle, speculate, draft, model.bundle.manifest.full)
        watches = [Spans(name, model.bundle.manifest, provider)] if spans else []
        workers[name] = Worker(
            model,
            replace(settings, speculation=speculation),
            Watches(metrics.watch(name), *watches),
            on_failure=out.warn,
        )
        metrics.attach(name, workers[name])
    http = HttpSettings(max_body, request_seconds=timeout, drain_seconds=drain_seconds, keys=keys)
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    listening = f"serving {', '.join(workers)} at {address}"
    serve_http(workers, http, bound, expose=metrics.expose, on_start=lambda: out.say(listening), report=out.warn)


def _named(bundles: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """Return the bundles by name. Raises DynexportError for a name that stands for two, or too many names."""
    if len(names) > len(bundles):
        raise DynexportError(f"--name: expected at most {len(bundles)}, one for each bundle, found {len(names)}")
    chosen = [*names, *(path.resolve().name for path in bundles[len(names) :])]
    for name in chosen:
        if not re.fullmatch(r"[\w.:/+-]{1,200}", name):
            raise DynexportError(f"--name: expected letters, digits and . : / + - _, found {name!r:.80}")
        if chosen.count(name) > 1:
            raise DynexportError(f"--name: expected a different one for each bundle, found {name} twice")
    return dict(zip(chosen, bundles, strict=True))


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file; none without one. Raises DynexportError for a file without keys."""
    if path is None:
        return ()
    lines = read_plain(path).decode("ascii", "replace").split()
    if not lines:
        raise DynexportError(f"{path}: expected API keys, one per line, found none")
    return tuple(lines)


__all__ = ["serve"]
