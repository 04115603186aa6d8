"""One child process of a stack, where it logs, and what it said last.

Knows how a log line with an error starts and which exit codes mean that the user can mend it, not what the
process is.
"""

import contextlib
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ERROR = re.compile(r"\d{4}-\d\d-\d\d \S+ (?:ERROR|CRITICAL) \S+ ")
_REFUSALS = {2, 64, 65, 66, 69, 73, 78}  # sysexits.h; 2: wrong option
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Part:
    """A started process; `log` None: its output goes to the terminal."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path | None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Return when it has ended or `timeout_s` has passed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)

    def obituary(self, code: int) -> str:
        """Say how it ended and why: its last words if it refused, its last lines if it broke."""
        lines = self._tail()
        if code in _REFUSALS and lines:
            return f"the {self.name} exited with {code}: {_last_words(lines)}"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return "\n".join([f"the {self.name} {how}", *self.last_lines()])

    def last_lines(self) -> list[str]:
        """Return the last lines of its log, each with its name before it."""
        return [f"  {self.name}: {line}" for line in self._tail()]

    def _tail(self) -> list[str]:
        if self.log is None:
            return []
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _last_words(lines: Sequence[str]) -> str:
    """Return the last error of a log, all its lines, without time and level; else the last line."""
    starts = [index for index, line in enumerate(lines) if _ERROR.match(line)]
    message = " ".join(lines[starts[-1] if starts else -1 :])
    return _ERROR.sub("", message)
