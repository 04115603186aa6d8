"""Stop strings: found while text grows, whatever its pieces. Text that may yet become a match waits.

The match is the one that completes first; of those that complete at the same character, the longest. One
state machine (Knuth, Morris, Pratt) per stop string: linear time.
"""

from collections.abc import Sequence


class StopMatcher:
    """Of one stream. `matched` is the stop string that was found, once one was."""

    __slots__ = ("_borders", "_held", "_states", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self.matched: str | None = None
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # characters of each stop that the text's end equals
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may go out now: all before the match, or all that is no beginning of one."""
        assert self.matched is None
        for place, char in enumerate(text):
            found = self._step(char)
            if found is not None:
                self.matched = found
                return (self._held + text)[: len(self._held) + place + 1 - len(found)]
        text = self._held + text
        keep = max(self._states, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What waited, now that no text follows."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    def _step(self, char: str) -> str | None:
        """Advances every state by one character; the longest stop string that it completes."""
        for index, stop in enumerate(self._stops):
            state = self._states[index]
            borders = self._borders[index]
            while state and stop[state] != char:
                state = borders[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                return stop
            self._states[index] = state
        return None


def _borders(stop: str) -> list[int]:
    """At i: the length of the longest proper prefix of `stop` that ends stop[: i + 1]."""
    borders = [0] * len(stop)
    state = 0
    for place in range(1, len(stop)):
        while state and stop[state] != stop[place]:
            state = borders[state - 1]
        if stop[state] == stop[place]:
            state += 1
        borders[place] = state
    return borders
