"""The options of a command that say how tokens are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from dynexport.exporter.cli.arguments import settings

_FILE = "as generation_config.json says"
_OPTIONS = (
    click.option("--temperature", type=float, help=f"0 is greedy.  [default: {_FILE}, else 0]"),
    click.option(
        "--top-p", type=float, help=f"Sample from the likeliest tokens of this share.  [default: {_FILE}, else 1]"
    ),
    click.option(
        "--top-k", type=int, help=f"Sample from so many likeliest tokens; 0 from all.  [default: {_FILE}, else 0]"
    ),
    click.option(
        "--min-p",
        type=float,
        help=f"Sample from tokens at least so probable, against the likeliest.  [default: {_FILE}, else 0]",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help=f"Above 1: make tokens that came before less probable.  [default: {_FILE}, else 1]",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        help="Subtract this from a token's logit for each time that it was generated, -2 to 2.  [default: 0]",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        help="Subtract this from the logits of tokens that were generated, -2 to 2.  [default: 0]",
    ),
    click.option(
        "--logit-bias",
        metavar="ID=NUMBER",
        multiple=True,
        help="Add a number from -100 to 100 to the logit of a token; may be given several times.",
    ),
    click.option("--min-new-tokens", type=int, help=f"Do not end before so many tokens.  [default: {_FILE}, else 0]"),
    click.option(
        "--no-repeat-ngram-size",
        type=int,
        help=f"Generate no sequence of so many tokens twice; 0 is off.  [default: {_FILE}, else 0]",
    ),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options; it gets each by the name of its field of ``Sampling``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Sampling`` that were given.

    Raises:
        click.BadParameter: for a bias that is not ID=NUMBER.
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
