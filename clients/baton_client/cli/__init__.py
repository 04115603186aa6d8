"""The `baton` command: start and stop a local stack, and ask a running one.

Each subcommand is a module with `add_parser`; errors are one clear line and an exit code, never a traceback.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from baton_client.cli import chat, down, generate, model, tokenize, up
from baton_client.cli.explain import explain
from baton_client.errors import BatonError
from baton_client.stack import StackError

_EPILOG = """\
a first session:
  baton up --detach             start a local stack in the background
  baton chat "What is a plan?"  ask it
  baton generate "Once upon"    continue a text
  baton down                    stop it

Each command explains itself: baton COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 0
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BatonError as error:
        print(f"baton: {explain(error, arguments)}", file=sys.stderr)
        return error.exit_code if isinstance(error, StackError) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve a large language model locally, and talk to one that is served.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('baton-serve')}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (up, down, chat, generate, tokenize, model):
        module.add_parser(commands)
    return parser
