"""Shows several answers while they stream: live panels on a terminal, labelled lines elsewhere.

Knows nothing about where the text comes from.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

_LINE_CHARS = 72


class Display(Protocol):
    """Where the text of stream `index`, counted from 0, goes."""

    def add(self, index: int, text: str) -> None:
        """Show more text of a stream."""

    def end(self, index: int) -> None:
        """Show that a stream has ended."""


@contextmanager
def display(titles: Sequence[str]) -> Iterator[Display]:
    """Yield a display for one stream per title."""
    console = Console()
    if not console.is_terminal:
        for index, title in enumerate(titles, 1):
            print(f"[{index}] {title}")
        yield Lines(len(titles))
        return
    with Live(console=console, refresh_per_second=20, vertical_overflow="visible") as live:
        yield Panels(live, titles)


class Lines:
    """Prints a stream's text in lines that start with its number, each as soon as it is full."""

    def __init__(self, streams: int) -> None:
        self._pending = [""] * streams

    def add(self, index: int, text: str) -> None:
        """Print what fills whole lines; keep the rest."""
        pending = self._pending[index] + text
        while "\n" in pending or len(pending) > _LINE_CHARS:
            line, pending = _split(pending)
            print(f"[{index + 1}] {line}", flush=True)
        self._pending[index] = pending

    def end(self, index: int) -> None:
        """Print the rest."""
        print(f"[{index + 1}] {self._pending[index]}", flush=True)
        self._pending[index] = ""


class Panels:
    """One panel for each stream, redrawn as text comes in."""

    def __init__(self, live: Live, titles: Sequence[str]) -> None:
        self._live = live
        self._titles = titles
        self._texts = [""] * len(titles)
        self._ended = [False] * len(titles)
        self._draw()

    def add(self, index: int, text: str) -> None:
        """Append text to a panel."""
        self._texts[index] += text
        self._draw()

    def end(self, index: int) -> None:
        """Mark a panel as complete."""
        self._ended[index] = True
        self._draw()

    def _draw(self) -> None:
        streams = zip(self._titles, self._texts, self._ended, strict=True)
        self._live.update(
            Group(
                *(
                    Panel(
                        Text(text if ended else f"{text}▌"),
                        title=Text(title),
                        title_align="left",
                        border_style="green" if ended else "cyan",
                    )
                    for title, text, ended in streams
                )
            )
        )


def _split(text: str) -> tuple[str, str]:
    """Return one line of `text` and what follows: up to a line end, else to the last space that fits."""
    head, newline, tail = text.partition("\n")
    if newline and len(head) <= _LINE_CHARS:
        return head, tail
    space = text.rfind(" ", 1, _LINE_CHARS + 1)
    cut = space if space > 0 else _LINE_CHARS
    return text[:cut], text[cut:].removeprefix(" ")
