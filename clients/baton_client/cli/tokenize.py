"""`baton tokenize`: the token ids of a text or a chat message."""

import argparse
import json

from baton_client.cli.options import Commands, add_address, add_command, text_of
from baton_client.client import Client
from baton_client.prompt import ChatMessage

_EXAMPLES = """\
  baton tokenize "Once upon a time"
  baton tokenize --chat "What is a plan?"   the conversation as the model reads it
  baton tokenize --count < book.txt
"""


def add_parser(commands: Commands) -> None:
    """Add `baton tokenize`."""
    parser = add_command(commands, "tokenize", _run, summary="turn a text into token ids", examples=_EXAMPLES)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text; '-' or none: stdin")
    parser.add_argument(
        "--chat", action="store_true", help="take it as a user's message: apply the chat template"
    )
    parser.add_argument("--count", action="store_true", help="print only how many tokens there are")
    add_address(parser)


def _run(arguments: argparse.Namespace) -> int:
    text = text_of(arguments.text)
    with Client(arguments.address, timeout_s=arguments.timeout) as client:
        tokens = client.tokenize([ChatMessage("user", text)] if arguments.chat else text)
    if arguments.count:
        print(len(tokens.token_ids))
    else:
        print(json.dumps({"token_ids": list(tokens.token_ids), "text": tokens.text}, ensure_ascii=False))
    return 0
