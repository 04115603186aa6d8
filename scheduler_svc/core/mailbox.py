"""What each front-end is told next: news of its requests gathers here until the engine sends one frame.

An owner is a number: the front-end's in the high half, its handle in the low 32 bits.
"""

from dataclasses import dataclass, field

import numpy as np

from baton_wire.columns import TOKEN, Column
from baton_wire.frontend import HANDLE, OVER, STARTED, Step, Verdict

HANDLE_BITS = 32
_HANDLE_MASK = (1 << HANDLE_BITS) - 1


@dataclass(slots=True)
class _News:
    """Of one front-end."""

    handles: list[Column] = field(default_factory=list)
    tokens: list[Column] = field(default_factory=list)
    over: list[tuple[int, int]] = field(default_factory=list)
    started: list[tuple[int, int]] = field(default_factory=list)

    def step(self) -> Step:
        """The message."""
        return Step(
            handles=np.concatenate(self.handles) if self.handles else np.empty(0, HANDLE),
            tokens=np.concatenate(self.tokens) if self.tokens else np.empty(0, TOKEN),
            over=np.array(self.over, OVER),
            started=np.array(self.started, STARTED),
        )


class Mailbox:
    """News by front-end number, in the order in which it came."""

    def __init__(self) -> None:
        self._news: dict[int, _News] = {}

    def tokens(self, owners: Column, tokens: Column) -> None:
        """One more token for each of these owners: int64 and int32 [n]."""
        if not len(owners):
            return
        numbers = owners >> HANDLE_BITS
        first = int(numbers[0])
        if (numbers == first).all():
            self._add(first, owners, tokens)
            return
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            self._add(number, owners[mine], tokens[mine])

    def started(self, owner: int, cached: int) -> None:
        """A request was admitted, with so many prompt tokens from the cache."""
        self._of(owner >> HANDLE_BITS).started.append((owner & _HANDLE_MASK, cached))

    def over(self, owner: int, verdict: Verdict) -> None:
        """A request is over, after all its tokens."""
        self._of(owner >> HANDLE_BITS).over.append((owner & _HANDLE_MASK, verdict))

    def forget(self, number: int) -> None:
        """That front-end is gone."""
        self._news.pop(number, None)

    def empty(self) -> list[tuple[int, Step]]:
        """Takes all news out: one message for each front-end that has any."""
        steps = [(number, news.step()) for number, news in self._news.items()]
        self._news.clear()
        return steps

    def _of(self, number: int) -> _News:
        news = self._news.get(number)
        if news is None:
            news = self._news[number] = _News()
        return news

    def _add(self, number: int, owners: Column, tokens: Column) -> None:
        news = self._of(number)
        news.handles.append((owners & _HANDLE_MASK).astype(HANDLE))
        news.tokens.append(tokens)
