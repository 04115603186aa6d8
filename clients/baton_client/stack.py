"""A local stack: the scheduler service and its workers as child processes, started and stopped together.

Knows the commands' names and their one line of output, and nothing of what runs inside them. Blocking; every
wait has an end.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self

from baton_client.client import Client
from baton_client.errors import BatonError, UnavailableError
from baton_client.part import Part
from baton_client.results import HealthStatus

DEMO_MODEL_NAME = "baton-demo"  # the folder it lies in is called "model"

_TETHER = Path(__file__).with_name("tether.py")
_LISTENING = re.compile(r"^baton: listening on (\S+)", re.MULTILINE)
_POLL_S = 0.05
_MAX_RUN_DIR_CHARS = 80  # a socket's path ends at 107 bytes, its name included

# The kernel's tie of a child to its parent is to the parent's *thread* that started it: one that lives to the
# end.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="baton-starter")


class StackError(BatonError):
    """The stack could not start, or a part of it died; the message ends with the part's last output."""

    def __init__(self, message: str, *, exit_code: int = 70) -> None:
        super().__init__(message, reason="STACK")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to start. Port 0 picks a free one; `run_dir` None makes a private one that goes with the stack.

    `worker_command` is the module of a worker and its arguments, without the run directory; None: gpu_worker
    with `model`. `environment` is added to this process's. `verbose` shows the parts' logs on stderr in place
    of keeping them in files of the run directory.
    """

    model: str
    listen: str = "127.0.0.1:0"
    workers: int = 1
    run_dir: Path | None = None
    scheduler_args: Sequence[str] = ()
    worker_args: Sequence[str] = ()
    worker_command: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ready_timeout_s: float = 600.0
    drain_s: float = 35.0
    verbose: bool = False


class Stack:
    """A running stack. `address` is where it serves; leaving its `with` stops it.

    start: raises StackError if a part dies or readiness takes too long, after stopping what had started.
    """

    def __init__(self, options: StackOptions) -> None:
        self._options = options
        self._private = options.run_dir is None
        self.run_dir = options.run_dir or _private_run_dir()
        self._parts: list[Part] = []
        self.address = ""

    @classmethod
    def start(
        cls,
        options: StackOptions,
        on_progress: Callable[[str], None] = lambda _: None,
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Start everything and return once requests are taken by every worker."""
        stack = cls(options)
        try:
            deadline = time.monotonic() + options.ready_timeout_s
            stack._start_scheduler(deadline, on_progress, should_stop)
            stack._start_workers(deadline, on_progress, should_stop)
        except BaseException:
            stack.stop(drain=False)
            raise
        return stack

    def check(self) -> None:
        """Raise StackError if a part has died."""
        for part in self._parts:
            code = part.process.poll()
            if code is not None:
                raise StackError(part.obituary(code), exit_code=code if 0 < code < 126 else 70)

    def signal_workers(self, number: signal.Signals) -> None:
        """Send a signal to every worker."""
        for part in self._parts[1:]:
            part.signal(number)

    def stop(self, *, drain: bool = True) -> None:
        """Stop everything: the scheduler first, whose running streams finish if `drain`, then the workers."""
        patience_s = self._options.drain_s if drain else 5.0
        for part in self._parts:
            if part.name == "scheduler" or not drain:
                part.signal(signal.SIGTERM)
        try:
            for part in self._parts[:1]:
                part.wait(patience_s)
            for part in self._parts[1:]:
                part.signal(signal.SIGTERM)
            for part in self._parts[1:]:
                part.wait(5.0)
        finally:  # a second Ctrl-C ends the waiting, not the stopping
            for part in self._parts:
                part.signal(signal.SIGKILL)
                part.process.wait()
            self._parts.clear()
            if self._private:
                shutil.rmtree(self.run_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_scheduler(
        self, deadline: float, on_progress: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> None:
        """Start the scheduler and learn its address from the line it prints."""
        options = self._options
        on_progress("starting the scheduler")
        arguments = ("--model", options.model, "--listen", options.listen, "--run-dir", str(self.run_dir))
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        output = self.run_dir / "scheduler.out"
        self._spawn("scheduler", ("scheduler_svc", *arguments, *options.scheduler_args), output)
        while not (match := _LISTENING.search(output.read_text())):
            self._pause(deadline, "the scheduler does not listen", should_stop)
        self.address = match[1]

    def _start_workers(
        self, deadline: float, on_progress: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> None:
        """Start the workers and wait until each of them takes requests."""
        options = self._options
        command = options.worker_command or ("gpu_worker", "--model", options.model)
        for index in range(options.workers):
            self._spawn(f"worker {index}", (*command, "--run-dir", str(self.run_dir), *options.worker_args))
        on_progress("waiting for the worker to load the model")
        with Client(self.address) as client:
            while _ready_groups(client) < options.workers:
                self._pause(deadline, "the workers are not ready", should_stop)

    def _spawn(self, name: str, command: Sequence[str], output: Path | None = None) -> None:
        """Start `python -m command` tied to this process, in its own session: Ctrl-C is ours to handle."""
        log = None if self._options.verbose else self.run_dir / f"{name.replace(' ', '-')}.log"
        with contextlib.ExitStack() as files:
            stderr = files.enter_context(log.open("wb")) if log else None
            stdout = files.enter_context(output.open("wb")) if output else stderr
            start = _starter.submit(
                subprocess.Popen,
                [sys.executable, str(_TETHER), str(os.getpid()), "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **self._options.environment},
                start_new_session=True,
            )
            self._parts.append(Part(name, start.result(), log))

    def _pause(self, deadline: float, problem: str, should_stop: Callable[[], bool]) -> None:
        """Sleep a moment. Raises StackError if a part has died or the deadline has passed."""
        self.check()
        if should_stop():
            raise StackError("stopped while starting", exit_code=130)
        if time.monotonic() > deadline:
            quotes = [line for part in self._parts for line in part.last_lines()]
            raise StackError("\n".join([f"{problem} after {self._options.ready_timeout_s:g} s", *quotes]))
        time.sleep(_POLL_S)


def default_run_dir() -> Path:
    """Where the scheduler and its workers meet unless told otherwise: one place per user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "baton") if runtime else Path(f"/tmp/baton-{os.getuid()}")


def demo_model() -> Path | None:
    """Return the demo model of the source tree that this module belongs to; None where there is none."""
    path = Path(__file__).resolve().parents[2] / "demo" / "model"
    return path if (path / "config.json").is_file() else None


def _private_run_dir() -> Path:
    path = Path(tempfile.mkdtemp(prefix="baton-"))
    if len(str(path)) > _MAX_RUN_DIR_CHARS:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    return path


def _ready_groups(client: Client) -> int:
    """Return how many workers take requests; 0 while the service cannot say."""
    try:
        if client.health(timeout_s=2.0) is not HealthStatus.SERVING:
            return 0
        return client.model(timeout_s=2.0).ready_groups
    except UnavailableError:
        return 0
