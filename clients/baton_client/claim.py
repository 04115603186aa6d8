"""Who runs a stack in a run directory: a lock that ends with its holder, and a note for `baton down`.

Knows nothing about processes but their ids.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from baton_client.errors import BatonError

_LOCK = "up.lock"
_NOTE = "up.json"


class ClaimedError(BatonError):
    """Another stack runs in this run directory."""


@dataclass(frozen=True, slots=True)
class Running:
    """A stack: the process that owns it, and where it serves what; `address` is "" until it does."""

    pid: int
    address: str
    model: str


class Claim:
    """The right to run a stack in a run directory, held until `release` or the end of this process."""

    def __init__(self, run_dir: Path, model: str) -> None:
        """Take the claim for a stack that will serve `model`. Raises ClaimedError if another holds it."""
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _try_lock(run_dir)
        if lock is None:
            holder = running(run_dir)
            where = f"at {holder.address}" if holder and holder.address else "and is still starting"
            raise ClaimedError(
                f"a stack already runs {where} in {run_dir}: 'baton down --run-dir {run_dir}' stops it"
            )
        self._lock = lock
        self._note = run_dir / _NOTE
        self._model = model
        self.publish("")

    def publish(self, address: str) -> None:
        """Note where the stack of this process serves."""
        fresh = self._note.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(Running(os.getpid(), address, self._model))))
        fresh.replace(self._note)

    def release(self) -> None:
        """Give the claim back."""
        self._note.unlink(missing_ok=True)
        self._lock.close()


def running(run_dir: Path) -> Running | None:
    """Return the stack that runs in `run_dir`, None if none does."""
    if not is_claimed(run_dir):
        return None
    try:
        return Running(**json.loads((run_dir / _NOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_claimed(run_dir: Path) -> bool:
    """Whether a living process holds the claim on `run_dir`."""
    if not (run_dir / _LOCK).exists():
        return False
    lock = _try_lock(run_dir)
    if lock is None:
        return True
    lock.close()
    return False


def _try_lock(run_dir: Path) -> TextIO | None:
    """Return the lock file, locked, or None if another process has it; closing the file unlocks it."""
    file = (run_dir / _LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
