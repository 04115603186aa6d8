"""Child processes of tests: started with their output in files, waited for with an end, ended by their id."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = [ROOT, *(ROOT / folder for folder in ("proto", "kernels", "clients", "sim"))]
T = TypeVar("T")


class Child:
    """`python -m module arguments…`, its output kept in `out` and `err`."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCE_ROOTS))}
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        """What it printed."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it logged."""
        return self._err.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Its exit status, negative for a signal. Fails where it does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end\n{self.err[-4000:]}") from None

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()


def wait_until(what: Callable[[], T], timeout_s: float = 20.0, *, why: str = "") -> T:
    """The first true value of `what`; fails with `why` where none comes in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"timed out waiting: {why or what}"
        time.sleep(0.02)
    return value


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
