"""`baton generate`: continue a text or token ids, streaming."""

import argparse

from baton_client.cli.answer import print_answer
from baton_client.cli.options import Commands, add_address, add_command, add_sampling, sampling_of, text_of
from baton_client.client import Client
from baton_client.errors import InvalidArgumentError
from baton_client.prompt import Prompt

_EXAMPLES = """\
  baton generate "Once upon a time" --max-tokens 40
  baton generate "2, 4, 6," --temperature 0 --stop 12
  echo "The plan is" | baton generate --seed 7 --stats
  baton generate --token-ids 84,104,257 --json

A chat model answers questions better through 'baton chat'.
"""


def add_parser(commands: Commands) -> None:
    """Add `baton generate`."""
    parser = add_command(commands, "generate", _run, summary="continue a text", examples=_EXAMPLES)
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text to continue; '-' or none: stdin"
    )
    parser.add_argument("--token-ids", metavar="ID,ID,…", help="token ids to continue in place of a text")
    parser.add_argument("--json", action="store_true", help="print every event as a line of JSON")
    parser.add_argument(
        "--stats", action="store_true", help="print token counts, TTFT and ITL to stderr at the end"
    )
    add_address(parser)
    add_sampling(parser)


def _run(arguments: argparse.Namespace) -> int:
    prompt: Prompt = _token_ids(arguments) if arguments.token_ids is not None else text_of(arguments.prompt)
    sampling = sampling_of(arguments)
    with Client(arguments.address, timeout_s=arguments.timeout) as client:
        print_answer(client, prompt, sampling, as_json=arguments.json, stats=arguments.stats)
    return 0


def _token_ids(arguments: argparse.Namespace) -> list[int]:
    if arguments.prompt is not None:
        raise InvalidArgumentError("give a text or --token-ids, not both")
    try:
        return [int(part) for part in arguments.token_ids.replace(",", " ").split()]
    except ValueError:
        raise InvalidArgumentError(
            f"--token-ids: integers separated by commas are expected, not {arguments.token_ids!r}"
        ) from None
