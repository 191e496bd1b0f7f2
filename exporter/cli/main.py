"""The ``dynexport`` command: its sub-commands, and its error messages."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from dynexport.exporter.cli.bench import bench
from dynexport.exporter.cli.build import build
from dynexport.exporter.cli.calibrate import calibrate
from dynexport.exporter.cli.convert import convert
from dynexport.exporter.cli.doctor import doctor
from dynexport.exporter.cli.evaluate import evaluate
from dynexport.exporter.cli.export_triton import export_triton
from dynexport.exporter.cli.gpu_check import gpu_check
from dynexport.exporter.cli.inspect import inspect
from dynexport.exporter.cli.profile import profile
from dynexport.exporter.cli.run import run
from dynexport.exporter.cli.serve import serve
from dynexport.exporter.cli.verify import verify
from dynexport.runtime.bundle.errors import EXIT_BAD_INPUT, DynexportError, one_line

_DEBUG = "--debug"


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, SystemExit) as error:
            # The reader closed the pipe. click and rich then exit with 1, which here means a failed check.
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
                raise
            _discard_output()
            sys.exit(128 + signal.SIGPIPE)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dynexport", prog_name="dynexport")
@click.option(_DEBUG, is_flag=True, help="Write the traceback of an error to a log file and print its path.")
def cli(debug: bool) -> None:
    """Deploy language models that do not run every layer for every token.

    \b
    Examples:
      dynexport convert SmolLM2-135M-Instruct --strategy unified-skip --speedup 2 -o smollm2
      dynexport verify smollm2 --against SmolLM2-135M-Instruct
      dynexport run smollm2 --chat --prompt "What is the capital of France?" --speedup 1
      dynexport bench smollm2
    """


for command in (
    *(convert, verify, run, serve, bench, evaluate, calibrate, profile, build, export_triton),
    *(inspect, doctor, gpu_check),
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line; exit codes: 0 good, 1 a check failed, 2 bad usage or input."""
    # Exit normally on SIGTERM, so that temporary files are removed.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    _open_streams()
    try:
        # --debug is accepted anywhere.
        arguments = sys.argv[1:]
        words = [word for word in arguments if word != _DEBUG]
        code = cli.main(words, prog_name="dynexport", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f"; see {context.command_path} --help" if context is not None else ""
        _say(f"error: {error.format_message()}{see}", log=error)
        sys.exit(EXIT_BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        sys.exit(128 + signal.SIGINT)
    except DynexportError as error:
        _discard_output()
        _say(f"error: {error}", log=error)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        where = "standard output" if _discard_output() else error.filename or type(error).__name__
        _say(f"error: {where}: {error.strerror or error}", log=error)
        sys.exit(EXIT_BAD_INPUT)
    except MemoryError as error:
        _say("error: out of memory; use a smaller model, batch or context", log=error)
        sys.exit(EXIT_BAD_INPUT)
    except Exception as error:
        _say(
            f"error: this is a bug in dynexport: {type(error).__name__}: {error}; run it again with {_DEBUG}",
            log=error,
        )
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Open missing standard streams, so that a file opened later does not get their number and text."""
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdin, sys.stderr = sys.stdin or open(0), sys.stderr or open(2, "w")  # noqa: SIM115 - never closed
    if sys.stdout is None:
        _say(
            "error: standard output: expected a place to write, found it closed; redirect it to /dev/null to discard it"
        )
        sys.exit(EXIT_BAD_INPUT)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"


def _discard_output() -> bool:
    """Discard output that cannot be written, so that the flush at exit succeeds; return whether there was some."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _say(text: str, log: BaseException | None = None) -> None:
    """Print one line on standard error; with --debug also write the traceback to a file and print its path."""
    # Messages quote untrusted input: line breaks, escape sequences and excess length are removed.
    line = one_line(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
    with contextlib.suppress(OSError):  # standard error may be full
        click.echo(line, err=True)
    if log is not None and _DEBUG in sys.argv[1:]:
        descriptor, path = tempfile.mkstemp(prefix="dynexport-", suffix=".log")
        os.close(descriptor)
        Path(path).write_text("".join(traceback.format_exception(log)))
        click.echo(f"traceback: {path}", err=True)


logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
