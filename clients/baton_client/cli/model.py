"""`baton model`: what is served, and whether it takes requests."""

import argparse
import json
from dataclasses import asdict

from baton_client.cli.options import Commands, add_address, add_command
from baton_client.client import Client

_EXAMPLES = """\
  baton model                          limits and default sampling, as JSON
  baton model --address 10.0.0.7:50051
"""


def add_parser(commands: Commands) -> None:
    """Add `baton model`."""
    parser = add_command(commands, "model", _run, summary="describe the served model", examples=_EXAMPLES)
    add_address(parser)


def _run(arguments: argparse.Namespace) -> int:
    with Client(arguments.address, timeout_s=arguments.timeout) as client:
        described = asdict(client.model()) | {"health": client.health().name}
    print(json.dumps(described, indent=2, ensure_ascii=False))
    return 0
