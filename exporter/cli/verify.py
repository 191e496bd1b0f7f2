"""``dynexport verify``: check that a bundle computes what PyTorch computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynexport.exporter.cli.arguments import backend_option, bundle_argument, threads_option, trust_option
from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import EXIT_CHECK_FAILED, EXIT_GOOD
from dynexport.runtime.engines.registry import RunBackend

if TYPE_CHECKING:
    from dynexport.exporter.parity import Check


@click.command(
    epilog="""\b
Examples:
  dynexport verify smollm2
  dynexport verify smollm2 --against ./SmolLM2-135M-Instruct --new-tokens 256 --json report.json"""
)
@bundle_argument
@click.option(
    "--against",
    metavar="MODEL",
    help="The checkpoint, run by PyTorch.  [default: the bundle's golden vectors]",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --against: the adapter that convert merged into the checkpoint.",
)
@click.option(
    "--new-tokens",
    type=int,
    default=32,
    show_default=True,
    help="Tokens generated greedily per prompt and ratio.",
)
@click.option("--long", is_flag=True, help="Check up to the end of the context at any cost; only with --against.")
@backend_option
@trust_option
@threads_option
@json_option
def verify(
    bundle: Path,
    against: str | None,
    adapter: Path | None,
    new_tokens: int,
    long: bool,
    backend: RunBackend,
    trust_engines: bool,
    threads: int,
    json_path: str | None,
) -> int:
    """Check BUNDLE against PyTorch: constants, logits, routes, greedy tokens, batches, chunks, conversations.

    Exit code 1 if a check fails.
    """
    from dynexport.exporter.parity import verify as run_ladder
    from dynexport.exporter.parity.reach import COMPETING
    from dynexport.runtime.text.text_checks import check_text

    out = Output(json_path)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    opened.check()
    check_text(opened)
    with opened.unchanged(), out.progress("verifying") as bar:
        report = run_ladder(
            opened,
            against,
            adapter=adapter,
            backend=backend,
            threads=threads,
            new_tokens=new_tokens,
            long=long,
            progress=bar.stage,
        )
    title = f"{bundle} against {against or 'its golden vectors'}"
    compared = [check for check in report.checks if not check.of_routes]
    columns = ["", "check", "largest error", "mean KL", "top-1 agreement"]
    out.table(title, columns, [[*_verdict(check), *_figures(check.headlines)] for check in compared])
    routed = [check for check in report.checks if check.of_routes]
    if routed:
        columns = ["", "routes of", "decisions", "run", "agree", "flips", "margins"]
        out.table("", columns, [[*_verdict(check), *_route_figures(check.metrics)] for check in routed])
    for check in report.checks:
        if check.failures:
            out.say(f"{check.name}: {'; '.join(check.failures)}")
    if report.departure is not None:
        verb = "decisions diverge" if report.departure.of == "decisions" else "output diverges"
        out.say(f"first layer whose {verb}: {report.departure.first}")
    if report.reference:
        out.say(f"the checkpoint was read by {report.reference}")
    for missed in report.not_exercised:
        reachable = not long and against is not None and missed != COMPETING
        out.say(f"not exercised: {missed}{'; --long goes there' if reachable else ''}")
    decided = "" if report.route_agreement is None else f"{report.route_agreement:.2%} of decisions agree; "
    out.say(
        f"{'passed' if report.passed else 'FAILED'}: {decided}{report.token_agreement:.2%} of tokens agree, "
        f"{report.ambiguous_tokens} near-ties left out{_left_out(report.not_exercised)}"
    )
    out.report(report.to_json())
    return EXIT_GOOD if report.passed else EXIT_CHECK_FAILED


def _left_out(missed: Sequence[str]) -> str:
    return f"; {len(missed)} not exercised, see above" if missed else ""


def _verdict(check: Check) -> list[str]:
    return ["passed" if check.passed else "FAILED", check.name.removeprefix("routes/")]


def _route_figures(metrics: Mapping[str, Any]) -> list[str]:
    """Return decisions, share that run, agreement, and the independent flips with their largest margin."""
    margins = metrics["flip_margins"]
    return [
        str(metrics["decisions"]),
        f"{metrics['share']:.1%}",
        f"{metrics['agreement']:.2%}",
        str(len(margins)),
        f"<= {max(margins):.2g}" if margins else "",
    ]


def _figures(headlines: Mapping[str, Any]) -> list[str]:
    """Return error, KL and agreement as text; "identical" for a passed check of exact equality."""
    if headlines.get("identical") is True:
        return ["identical", "", ""]
    error, divergence, agreement = (headlines.get(name) for name in ("max_abs", "mean_kl", "top1_agreement"))
    return [
        "-" if error is None else f"{error:.2g}",
        "-" if divergence is None else f"{divergence:.2g}",
        "-" if agreement is None else f"{agreement:.1%}",
    ]
