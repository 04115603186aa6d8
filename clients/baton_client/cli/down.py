"""`baton down`: stop the stack that `baton up` started."""

import argparse
import contextlib
import os
import signal
import time
from pathlib import Path

from baton_client.claim import is_claimed, running
from baton_client.cli.console import spinner
from baton_client.cli.options import Commands, add_command
from baton_client.errors import BatonError
from baton_client.stack import default_run_dir

_EXAMPLES = """\
  baton down                 let running answers finish, then stop
  baton down --timeout 5     do not wait longer than that
  baton down --run-dir DIR   the stack of another run directory
"""


def add_parser(commands: Commands) -> None:
    """Add `baton down`."""
    parser = add_command(commands, "down", _run, summary="stop the local stack", examples=_EXAMPLES)
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=default_run_dir(),
        metavar="DIR",
        help="its run directory (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="how long stopping may take (default: %(default)g)",
    )


def _run(arguments: argparse.Namespace) -> int:
    found = running(arguments.run_dir)
    if found is None:
        print(f"no stack runs in {arguments.run_dir}")
        return 0
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + arguments.timeout
    with spinner("stopping: running answers may finish"):
        while is_claimed(arguments.run_dir):
            if time.monotonic() > deadline:
                raise BatonError(f"pid {found.pid} is still stopping after {arguments.timeout:g} s")
            time.sleep(0.05)
    where = f"at {found.address}" if found.address else "while it was starting"
    print(f"stopped {found.model} {where}")
    return 0
