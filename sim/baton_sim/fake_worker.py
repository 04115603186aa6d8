"""A worker without a GPU, a model or torch, over the real link: `python -m baton_sim.fake_worker --help`.

Executes plans with `SlotTable`, so it also checks the core that sends them. What it generates for a request
is computed by `expected_tokens`. Several run side by side; each is a group of its own.
"""

import argparse
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from baton_sim.fake_model import Expected, FakeModel, expected_tokens
from baton_sim.slot_table import SlotTable
from baton_wire.fingerprint import fingerprint
from baton_wire.hello import WorkerHello
from baton_wire.transport import default_run_dir, ipc_endpoint
from baton_wire.worker_session import Refused, WorkerSession

__all__ = ["EXIT_REFUSED", "Expected", "FakeModel", "FakeWorker", "Faults", "expected_tokens", "main"]

EXIT_REFUSED = 65
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong on purpose, after so many steps of the process; 0: never."""

    crash_after: int = 0
    hang_after: int = 0


class FakeWorker:
    """One rank: a session with the core at `endpoint` and a slot table, emptied whenever the session is lost.

    A step takes `step_us` of a device that executes plans back to back.
    """

    def __init__(
        self,
        endpoint: str,
        hello: WorkerHello,
        model: FakeModel,
        step_us: int = 0,
        faults: Faults | None = None,
        step_log: BinaryIO | None = None,
    ) -> None:
        """`step_log`: where a record of STEP_LOG goes for each token, as its step ends."""
        self._table = SlotTable(hello, model)
        self._step_us = step_us
        self._faults = faults or Faults()
        self._step_log = step_log
        self._steps = 0
        self._device_free_s = 0.0
        self._stopping = False
        self.session = WorkerSession(endpoint, hello, self._reset)

    def run(self) -> None:
        """Until `stop`. Raises `Refused`, `WireError`, or `ContractError` where the core is wrong."""
        while not self._stopping:
            for plan in self.session.poll(_POLL_S):
                start, began_ns = time.perf_counter(), time.monotonic_ns()
                result = self._table.execute(plan, self._step_us)
                self._occupy_device(start)
                self._fail_on_purpose()
                if self._step_log is not None:
                    records = self._table.sampled(result.tokens, began_ns, time.monotonic_ns())
                    self._step_log.write(records.tobytes())
                self.session.reply(result)
        self.session.leave()
        if self._step_log is not None:
            self._step_log.close()

    def stop(self) -> None:
        """Lets `run` end in order after the plans at hand; may be called from a signal handler."""
        self._stopping = True

    def _reset(self) -> None:
        self._table = SlotTable(self._table.hello, self._table.model)

    def _occupy_device(self, start_s: float) -> None:
        """Returns when the device is done with the step."""
        self._device_free_s = max(start_s, self._device_free_s) + self._step_us * 1e-6
        remaining_s = self._device_free_s - time.perf_counter()
        if remaining_s > 0:
            time.sleep(remaining_s)

    def _fail_on_purpose(self) -> None:
        self._steps += 1
        if self._steps == self._faults.crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._steps == self._faults.hang_after:
            signal.pause()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baton_sim.fake_worker",
        description="A worker that needs no GPU and no model: tokens are a hash of the sequence before them.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--run-dir", type=Path, default=default_run_dir(), help="run directory of the scheduler"
    )
    where.add_argument("--connect", metavar="ENDPOINT", help="endpoint of the core, in place of --run-dir")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="checkpoint directory to pretend to serve")
    model.add_argument("--fingerprint", help="fingerprint to present, in place of --model")
    parser.add_argument("--group", default=f"{socket.gethostname()}-{os.getpid()}", help="name of the group")
    sizes = parser.add_argument_group("limits")
    sizes.add_argument("--max-num-seqs", type=int, default=256, help="slots")
    sizes.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens per step")
    sizes.add_argument("--max-model-len", type=int, default=4096, help="tokens of the longest sequence")
    sizes.add_argument("--kvcache-block-size", type=int, default=16, help="tokens per block")
    sizes.add_argument("--num-kvcache-blocks", type=int, default=8192)
    sizes.add_argument("--row-multiple", type=int, default=8)
    fake = parser.add_argument_group("the model that it is not")
    fake.add_argument("--vocab-size", type=int, default=1000)
    fake.add_argument("--stop-id", type=int, help="token to generate once in --stop-every tokens")
    fake.add_argument("--stop-every", type=int, default=64)
    fake.add_argument("--numerical-every", type=int, default=0, help="one numerical end in so many tokens")
    fake.add_argument("--step-us", type=int, default=0, help="time that a step takes, microseconds")
    fake.add_argument("--step-log", type=Path, metavar="FILE", help="write when each token was sampled there")
    fake.add_argument("--crash-after", type=int, default=0, metavar="STEPS", help="kill itself after so many")
    fake.add_argument("--hang-after", type=int, default=0, metavar="STEPS", help="stop dead after so many")
    return parser


def _worker(arguments: argparse.Namespace) -> FakeWorker:
    hello = WorkerHello(
        group=arguments.group,
        rank=0,
        ranks=1,
        fingerprint=arguments.fingerprint or fingerprint(arguments.model),
        block_size=arguments.kvcache_block_size,
        num_blocks=arguments.num_kvcache_blocks,
        max_slots=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_tokens_per_step=arguments.max_num_batched_tokens,
        vocab_size=arguments.vocab_size,
        row_multiple=arguments.row_multiple,
    )
    model = FakeModel(
        arguments.vocab_size, arguments.stop_id, arguments.stop_every, arguments.numerical_every
    )
    endpoint = arguments.connect or ipc_endpoint(arguments.run_dir / "workers.ipc")
    faults = Faults(arguments.crash_after, arguments.hang_after)
    step_log = arguments.step_log.open("wb") if arguments.step_log else None
    return FakeWorker(endpoint, hello, model, arguments.step_us, faults, step_log)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM or SIGINT, 65 when the core refuses, 1 for a wrong argument or core."""
    arguments = _parser().parse_args(argv)
    try:
        worker = _worker(arguments)
    except (OSError, ValueError) as error:
        print(f"fake worker: {error}", file=sys.stderr)
        return 1

    def stop(_signal: int, _frame: FrameType | None) -> None:
        worker.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        worker.run()
    except Refused as refused:
        print(f"fake worker: refused: {refused}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
