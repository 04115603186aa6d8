"""`baton chat`: ask one question, or hold a conversation."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from baton_client.cli.answer import print_answer
from baton_client.cli.explain import explain
from baton_client.cli.options import Commands, add_address, add_command, add_sampling, sampling_of
from baton_client.client import Client
from baton_client.errors import BatonError, CallCancelledError, InvalidArgumentError
from baton_client.prompt import ChatMessage
from baton_client.sampling import Sampling

_EXAMPLES = """\
  baton chat                               a conversation: Ctrl-C stops an answer, Ctrl-D leaves
  baton chat "What is a plan?"             one question, one answer
  baton chat --system "Answer in French." "Who are you?" --temperature 0
  cat letter.txt | baton chat -            the question comes from standard input
"""


def add_parser(commands: Commands) -> None:
    """Add `baton chat`."""
    parser = add_command(commands, "chat", _run, summary="talk with the model", examples=_EXAMPLES)
    parser.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="one question; '-': stdin; none: a conversation"
    )
    parser.add_argument("--system", metavar="TEXT", help="how the model should behave: a system message")
    parser.add_argument("--json", action="store_true", help="print every event as a line of JSON")
    parser.add_argument(
        "--stats", action="store_true", help="print token counts, TTFT and ITL to stderr at the end"
    )
    add_address(parser)
    add_sampling(parser)


def _run(arguments: argparse.Namespace) -> int:
    sampling = sampling_of(arguments)
    history = [ChatMessage("system", arguments.system)] if arguments.system else []
    with Client(arguments.address, timeout_s=arguments.timeout) as client:
        if arguments.message is None:
            return _converse(client, history, sampling, arguments)
        question = sys.stdin.read() if arguments.message == "-" else arguments.message
        if not question:
            raise InvalidArgumentError("the message is empty")
        asked = [*history, ChatMessage("user", question)]
        print_answer(client, asked, sampling, as_json=arguments.json, stats=arguments.stats)
    return 0


def _converse(
    client: Client, history: list[ChatMessage], sampling: Sampling, arguments: argparse.Namespace
) -> int:
    """Ask and answer until the input ends; an answer that fails leaves the conversation as it was."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives the prompt a history and editing
    model = client.model()
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{model.name} at {client.address}. Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    for question in _questions(interactive):
        asked = [*history, ChatMessage("user", question)]
        try:
            answer = print_answer(client, asked, sampling, as_json=arguments.json, stats=arguments.stats)
        except (KeyboardInterrupt, CallCancelledError):
            print("\n[stopped]", file=sys.stderr)
        except BatonError as error:
            if not interactive:
                raise
            print(f"baton: {explain(error, arguments)}", file=sys.stderr)
        else:
            history = [*asked, ChatMessage("assistant", answer)]
    return 0


def _questions(interactive: bool) -> Iterator[str]:
    """What is asked, until the input ends. Ctrl-C drops the line; the first one says how to leave."""
    advice = "\n[Ctrl-D leaves]"
    while True:
        try:
            question = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(advice, file=sys.stderr)
            advice = ""
        else:
            if question.strip():
                yield question
