"""Lines to try on a stack that has just started: they work as printed, from the current directory."""

import json
import os
import shlex
import sys
from pathlib import Path

from baton_client.channel import SERVICE
from baton_client.stack import default_run_dir

_QUESTION = "What is Baton?"


def lines_to_try(supports_chat: bool, address: str) -> str:
    """Return commands that ask the server at `address`, one for each kind of client."""
    chat = {"messages": [{"role": "user", "content": _QUESTION}]}
    body = {"chat": chat} if supports_chat else {"text": _QUESTION, "stopping": {"maxTokens": 40}}
    data = shlex.quote(json.dumps(body))
    method = f"{SERVICE}/Generate"
    prompt = chat["messages"] if supports_chat else _QUESTION
    code = f'from baton_client import Client; print(Client("{address}").complete({json.dumps(prompt)}).text)'
    verb = "chat" if supports_chat else "generate"
    return "\n".join(
        [
            f"Baton serves at {address}. Try:",
            f"  {_tool('baton')} {verb} --address {address} {shlex.quote(_QUESTION)}",
            f"  {_tool('python', sys.executable)} -c {shlex.quote(code)}",
            f"  {_tool('buf')} curl --http2-prior-knowledge --protocol grpc -d {data} http://{address}/{method}",
            f"  grpcurl -plaintext -d {data} {address} {method}",
        ]
    )


def command(name: str, run_dir: Path) -> str:
    """Return the `baton` subcommand `name` for the stack in `run_dir`."""
    where = "" if run_dir == default_run_dir() else f" --run-dir {shlex.quote(str(run_dir))}"
    return f"{_tool('baton')} {name}{where}"


def _tool(name: str, path: str | None = None) -> str:
    """Return how to call a tool of this Python environment from here; its bare name if it has none."""
    found = Path(path) if path else Path(sys.executable).with_name(name)
    if not found.exists():
        return name
    try:
        return shlex.quote(str(found.relative_to(os.getcwd())))
    except ValueError:
        return shlex.quote(str(found))
