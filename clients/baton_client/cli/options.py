"""Command-line options that several subcommands share, and what is made of them."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from baton_client.channel import DEFAULT_ADDRESS, checked_address
from baton_client.errors import InvalidArgumentError
from baton_client.sampling import Sampling

Commands = Any  # argparse's own type for it is private


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends with examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the address of the server to ask."""
    parser.add_argument(
        "--address",
        type=_address,
        default=os.environ.get("BATON_ADDRESS", DEFAULT_ADDRESS),
        metavar="HOST:PORT",
        help="the server to ask (default: $BATON_ADDRESS, else %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="give up after so many seconds (default: wait as long as needed)",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add how tokens are chosen and when generation ends; unset options leave it to the model."""
    group = parser.add_argument_group("sampling (unset: the model's own defaults)")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the most likely token; up to 100"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="keep the most likely tokens of total P, above 0 to 1"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times the likeliest, 0 to 1"
    )
    group.add_argument("--seed", type=int, help="the same seed gives the same tokens")
    group = parser.add_argument_group("stopping")
    group.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens to generate")
    group.add_argument("--min-tokens", type=int, default=0, metavar="N", help="do not end before N tokens")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)"
    )
    group.add_argument(
        "--stop-token-id",
        action="append",
        default=[],
        type=int,
        metavar="ID",
        help="end at this token (repeatable)",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on past the model's end-of-sequence token"
    )


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Return the sampling that the options ask for. Raises InvalidArgumentError naming the field."""
    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        min_tokens=arguments.min_tokens,
        stop=arguments.stop,
        stop_token_ids=arguments.stop_token_id,
        ignore_eos=arguments.ignore_eos,
    )


def _address(text: str) -> str:
    try:
        return checked_address(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, above 0")
    return seconds


def text_of(given: str | None) -> str:
    """Return the text given as argument, or standard input for "-" or where nothing is given."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise InvalidArgumentError("a text is needed: as an argument, or on standard input")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"standard input is not UTF-8: {error}") from None
