"""What a person sees while something takes a while: a spinner on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def spinner(first: str) -> Iterator[Callable[[str], None]]:
    """Show what is going on, on stderr; yield a function that replaces the text."""
    started = time.monotonic()
    try:
        from rich.console import Console
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        print(f"{first} …", file=sys.stderr, flush=True)
        yield _printer(started)
        return
    with console.status(f"{first} …") as status:
        yield lambda text: status.update(f"{text} …")


def _printer(started_s: float) -> Callable[[str], None]:
    """Return a function that prints a text and the time since the start."""

    def show(text: str) -> None:
        print(f"{text} … ({time.monotonic() - started_s:.1f} s)", file=sys.stderr, flush=True)

    return show
