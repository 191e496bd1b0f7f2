"""``dynexport gpu-check``: run every check that needs a GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle.errors import EXIT_CHECK_FAILED, EXIT_GOOD, DynexportError
from dynexport.runtime.engines.tensorrt.gpu import NoGpu, find_gpu

if TYPE_CHECKING:
    from dynexport.exporter.cli.gpu_checks import Outcome

_SAMPLES = Path("samples") / "training" / "checkpoints"


@click.command(
    name="gpu-check",
    epilog="""\b
Examples:
  dynexport gpu-check
  dynexport gpu-check --quick --json gpu.json""",
)
@click.option("--quick", is_flag=True, help="Skip the benchmarks.")
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    default=_SAMPLES,
    show_default=True,
    help="Directory of the repository's trained samples.",
)
@json_option
def gpu_check(quick: bool, samples: Path, json_path: str | None) -> int:
    """Run every check that needs a GPU.

    Samples of every strategy are converted, built with every installed TensorRT, verified against PyTorch and
    benchmarked. Plugin kernels are compared with their ONNX bodies. ONNX Runtime's CUDA provider is verified. For
    comparison, torch decodes the same checkpoints in eager mode and compiled.

    Exit code 1 if a check fails or there is no GPU; checks of software that is not installed are skipped.
    """
    from dynexport.exporter.cli.gpu_checks import SAMPLES, WHAT, checks

    out = Output(json_path)
    here = find_gpu()
    if isinstance(here, NoGpu):
        names = [check.name for check in checks(samples, Path(), benchmarks=not quick)]
        out.say(f"FAILED: expected a GPU, found none ({here.reason}); a GPU is needed for {len(names)} checks: {WHAT}")
        out.report({"gpu": None, "reason": here.reason, "unchecked": names, "outcomes": []})
        return EXIT_CHECK_FAILED
    for sample in SAMPLES:
        if not (samples / sample / "config.json").is_file():
            raise DynexportError(
                f"{samples}: expected a checkpoint {sample}, found none; name their directory with --samples"
            )
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="dynexport-") as work:
        for check in checks(samples, Path(work), benchmarks=not quick):
            outcomes.append(check.outcome())
            # Shown immediately, because TensorRT may abort the process.
            _show(out, outcomes[-1])
    count = {state: sum(outcome.state == state for outcome in outcomes) for state in ("passed", "failed", "skipped")}
    verdict = "FAILED" if count["failed"] else "passed"
    out.say(f"{verdict}: {', '.join(f'{number} {state}' for state, number in count.items())}")
    out.report({"gpu": str(here), "outcomes": [outcome.model_dump() for outcome in outcomes]})
    return EXIT_CHECK_FAILED if count["failed"] else EXIT_GOOD


def _show(out: Output, outcome: Outcome) -> None:
    out.say(f"{outcome.state:8}{outcome.seconds:6.1f} s  {outcome.name}: {outcome.found}")
