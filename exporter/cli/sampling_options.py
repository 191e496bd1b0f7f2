"""Options that control sampling, and the sampling that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import click

from dynexport.exporter.cli.arguments import settings
from dynexport.exporter.cli.output import Output
from dynexport.runtime.generation.generation_config import GENERATION_CONFIG, Recommended
from dynexport.runtime.generation.sampling import Sampling

_FILE = "from generation_config.json"
_OPTIONS = (
    click.option("--temperature", type=float, help=f"0 is greedy.  [default: {_FILE}, else 0]"),
    click.option(
        "--top-p",
        type=float,
        help=f"Sample from the most probable tokens whose probabilities sum to this.  [default: {_FILE}, else 1]",
    ),
    click.option(
        "--top-k",
        type=int,
        help=f"Sample from this many most probable tokens; 0 means all.  [default: {_FILE}, else 0]",
    ),
    click.option(
        "--min-p",
        type=float,
        help=f"Sample from tokens with at least this fraction of the largest probability.  [default: {_FILE}, else 0]",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help=f"Above 1: make earlier tokens less probable.  [default: {_FILE}, else 1]",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        help="Subtract this from a token's logit once per time it was generated, -2 to 2.  [default: 0]",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        help="Subtract this from the logit of every generated token, -2 to 2.  [default: 0]",
    ),
    click.option(
        "--logit-bias",
        metavar="ID=NUMBER",
        multiple=True,
        help="Add a number from -100 to 100 to the logit of a token; may be given several times.",
    ),
    click.option("--min-new-tokens", type=int, help=f"Generate at least this many tokens.  [default: {_FILE}, else 0]"),
    click.option(
        "--no-repeat-ngram-size",
        type=int,
        help=f"Generate no sequence of this many tokens twice; 0 is off.  [default: {_FILE}, else 0]",
    ),
    click.option("--seed", type=int, help="Seed that makes sampling repeatable."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command; each has the name of its field of ``Sampling``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Sampling`` that were given.

    Raises:
        click.BadParameter: a bias is not ID=NUMBER.
    """
    fields = {name: value for name, value in options.items() if value is not None and name != "logit_bias"}
    if options["logit_bias"]:
        fields["logit_bias"] = _biases(options["logit_bias"])
    return fields


def _biases(options: tuple[str, ...]) -> dict[int, Any]:
    biases = settings(options, "--logit-bias")
    for token in biases:
        if not (token.isascii() and token.isdecimal() and len(token) < 20):
            raise click.BadParameter(f"expected ID=NUMBER, found {token!r:.40}", param_hint="--logit-bias")
    return {int(token): bias for token, bias in biases.items()}


def chosen_sampling(out: Output, recommended: Recommended, given: dict[str, Any]) -> Sampling:
    """Return the sampling: options override generation_config.json; print notes on both."""
    sampling = replace(recommended.sampling, **given)
    if recommended.left_out:
        out.warn(f"{GENERATION_CONFIG} asks for {', '.join(recommended.left_out)}: dynexport does not do that")
    filters = [name for name in ("top_p", "top_k", "min_p") if name in given]
    if sampling.temperature == 0 and filters and "temperature" not in given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in filters)
        out.warn(f"{options}: expected with --temperature above 0, found greedy choice, where it changes nothing")
    if (sampling.temperature > 0 or sampling.adjusts) and recommended.sampling != Sampling():
        plain = asdict(Sampling())
        fields = {name: value for name, value in asdict(sampling).items() if value != plain[name]}
        shown = ", ".join(f"{name.replace('_', '-')} {_short(value)}" for name, value in fields.items())
        out.note(
            f"sampling by {GENERATION_CONFIG} where no option overrides it: {shown}; --temperature 0 takes the most "
            "probable token"
        )
    return sampling


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else f"{value!s:.60}"
