"""The supervisor: starts core and front-ends, watches them, and ends the service whole, never half-alive.

Knows what the parts are called and how they end; nothing of what they say to each other.
"""

import asyncio
import fcntl
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from baton_wire.transport import EndpointError, private_ipc_dir
from scheduler_svc import checkpoint, config, logs
from scheduler_svc.checkpoint import Checkpoint, CheckpointError
from scheduler_svc.config import ServiceConfig
from scheduler_svc.port import PortInUseError, Reservation

_AFTER_GRACE_S = 5.0  # how long a part may take to end once it should
T = TypeVar("T")
logger = logging.getLogger(__name__)


class RunDirectoryError(Exception):
    """The run directory cannot be used; the message says which and why."""


class PartDiedError(Exception):
    """A part of the service ended by itself; the message says which and how."""


@contextmanager
def owned_run_dir(path: Path) -> Iterator[None]:
    """The run directory, private and locked for one service. Raises `RunDirectoryError`."""
    try:
        private_ipc_dir(path)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (EndpointError, OSError) as error:
        raise RunDirectoryError(f"run directory {path}: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(f"run directory {path}: another scheduler is using it") from None
        (path / "supervisor.pid").write_text(f"{os.getpid()}\n")
        yield
    finally:
        os.close(lock)


@dataclass(slots=True)
class Supervisor:
    """One service in a run directory that is locked for it. `run` once. `_port`: what front-ends share."""

    options: ServiceConfig
    model: Checkpoint
    _port: Reservation | None = None
    _parts: dict[str, Process] = field(default_factory=dict)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains. Raises `PartDiedError` and `PortInUseError`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        try:
            await self._start_core()
            address = await self._start_frontends()
            where = f"model {self.model.name}, run directory {self.options.run_dir}"
            print(f"baton: listening on {address} ({where})", flush=True)
            await self._watch(self._stop.wait())
            await self._end(self._frontends(), self.options.drain_grace_s + _AFTER_GRACE_S)
            await self._end(["core"], _AFTER_GRACE_S)
        finally:
            await self._kill_all()
            if self._port is not None:
                self._port.close()

    def _told_to_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _start_core(self) -> None:
        options = self.options
        await self._start(
            "core",
            "scheduler_svc.core_process",
            f"--run-dir={options.run_dir}",
            f"--fingerprint={self.model.fingerprint}",
            f"--max-queue={options.max_queue}",
            f"--worker-wait-s={options.worker_wait_s}",
            f"--log-level={options.log_level}",
        )

    def _frontends(self) -> list[str]:
        """Names of the front-ends."""
        count = self.options.frontends
        return ["frontend"] if count == 1 else [f"frontend-{number}" for number in range(1, count + 1)]

    async def _start_frontends(self) -> str:
        """The address at which all of them serve."""
        options = replace(self.options, model=str(self.model.path), served_model_name=self.model.name)
        if options.frontends > 1:
            self._port = Reservation(options.listen)
            options = replace(options, listen=self._port.address)
        for name in self._frontends():
            await self._start(name, "scheduler_svc.frontend", *options.arguments())
        addresses = {await self._address(self._parts[name]) for name in self._frontends()}
        assert len(addresses) == 1, addresses
        return addresses.pop()

    async def _address(self, process: Process) -> str:
        """Where a front-end serves, once it does."""
        assert process.stdout is not None
        line = await self._watch(process.stdout.readline())
        if not line:  # it is about to be gone
            await process.wait()
            self._check()
        return line.decode().strip()

    async def _start(self, name: str, module: str, *arguments: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=DEVNULL,
            stdout=DEVNULL if name == "core" else PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is ours to handle
        )
        self._parts[name] = process
        (self.options.run_dir / f"{name}.pid").write_text(f"{process.pid}\n")
        return process

    async def _watch(self, wish: Awaitable[T]) -> T:
        """The result of `wish`. Raises `PartDiedError` where a part ends before."""
        wished = asyncio.ensure_future(wish)
        ends = [asyncio.ensure_future(process.wait()) for process in self._parts.values()]
        try:
            await asyncio.wait([wished, *ends], return_when=asyncio.FIRST_COMPLETED)
            if not wished.done():
                self._check()
            return await wished
        finally:
            for task in (wished, *ends):
                task.cancel()

    def _check(self) -> None:
        """Raises `PartDiedError` where a part has ended."""
        for name, process in self._parts.items():
            if process.returncode is not None:
                raise PartDiedError(f"the {name} {_how(process)}; the service ends with it")

    async def _end(self, names: list[str], patience_s: float) -> None:
        """Tells parts to end and waits, though not longer than that, nor once somebody is in a hurry."""
        ending = {name: self._parts.pop(name) for name in names}
        for process in ending.values():
            with suppress(ProcessLookupError):
                process.terminate()
        try:
            await self._watch(self._gone(list(ending.values()), patience_s))
        finally:
            for process in ending.values():
                await _kill(process)
        for name, process in ending.items():
            if process.returncode not in (0, -signal.SIGKILL):
                raise PartDiedError(f"the {name} {_how(process)} when told to end")

    async def _gone(self, processes: list[Process], patience_s: float) -> None:
        """Until the processes have ended, the time is over, or somebody is in a hurry."""

        async def all_gone() -> None:
            for process in processes:
                await process.wait()

        events = [asyncio.ensure_future(all_gone()), asyncio.create_task(self._until_hurry())]
        await asyncio.wait(events, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()

    async def _until_hurry(self) -> None:
        await self._hurry.wait()

    async def _kill_all(self) -> None:
        for process in self._parts.values():
            await _kill(process)


async def _kill(process: Process) -> None:
    """Ends a process that has not ended."""
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _how(process: Process) -> str:
    """How a process ended, in words."""
    code = process.returncode
    assert code is not None
    return f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def main() -> int:
    """The process; its exit status (`--help` lists them)."""
    options = config.parse(None, "scheduler_svc")
    logs.configure(options.log_level, "supervisor")
    try:
        path = checkpoint.locate(options.model)
        name = options.served_model_name or (path.name if Path(options.model).exists() else options.model)
        model = checkpoint.load(path, name)
        with owned_run_dir(options.run_dir):
            asyncio.run(_run(options, model))
    except CheckpointError as error:
        return _fail(os.EX_NOINPUT, error)
    except RunDirectoryError as error:
        return _fail(os.EX_CANTCREAT, error)
    except (PartDiedError, PortInUseError) as error:
        return _fail(os.EX_SOFTWARE, error)
    return 0


async def _run(options: ServiceConfig, model: Checkpoint) -> None:
    await Supervisor(options, model).run()


def _fail(status: int, error: Exception) -> int:
    logger.error("%s", error)
    return status
