"""The core process: sockets, clock and signals around the engine. One thread, one loop, nothing else.

    receive what waits → hand it to the engine → send what the engine wants sent

Imports no gRPC and no torch. Ends when told by SIGTERM, or when its parent is gone.
"""

import argparse
import gc
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from baton_wire.transport import EndpointError, RouterSocket, ipc_endpoint, wait
from scheduler_svc import logs
from scheduler_svc.core.engine import Engine, EngineConfig, Hop

TICK_S = 0.02
logger = logging.getLogger(__name__)


class CoreProcess:
    """Owns the two listening sockets of a run directory and the engine between them."""

    def __init__(self, run_dir: Path, config: EngineConfig) -> None:
        self._run_dir = run_dir
        self._workers = RouterSocket(ipc_endpoint(run_dir / "workers.ipc"))
        self._frontends = RouterSocket(ipc_endpoint(run_dir / "frontends.ipc"))
        # Epochs of an earlier life of this process were given by an earlier clock.
        self._engine = Engine(config, first_epoch=int(time.time()) & 0x7FFFFFFF)
        self._parent = os.getppid()
        self._stopping = False
        self._dump = False

    def run(self) -> None:
        """Until SIGTERM or SIGINT, or the parent's end."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the supervisor
        signal.signal(signal.SIGUSR1, self._ask_dump)
        gc.collect()
        gc.freeze()  # what is here stays: a collection that looked at it all would hold up every group
        next_tick = 0.0
        while not self._stopping and os.getppid() == self._parent:
            wait([self._workers, self._frontends], TICK_S)
            now = time.monotonic()
            for peer, data in self._workers.receive_all():
                self._engine.on_worker(peer, data, now)
            for peer, data in self._frontends.receive_all():
                self._engine.on_frontend(peer, data, now)
            if now >= next_tick:
                self._engine.tick(now)
                next_tick = now + TICK_S
            self._probe(now)
            self._engine.pump()
            self._flush(now)
            if self._dump:
                self._write_state()
        self._workers.close(flush=True)
        self._frontends.close(flush=True)
        logger.info("stopped: %s", "told to" if self._stopping else "its supervisor is gone")

    def _flush(self, now: float) -> None:
        """Sends the engine's outbox. A peer that is gone is reported back, which may make more to send."""
        engine = self._engine
        while engine.outbox:
            outbox, engine.outbox = engine.outbox, []
            for hop, peer, data in outbox:
                socket = self._workers if hop is Hop.WORKER else self._frontends
                if not socket.send(peer, data):
                    self._gone(hop, peer, now)
            engine.pump()
        for line in engine.log:
            logger.info("%s", line)
        engine.log.clear()

    def _probe(self, now: float) -> None:
        """Some peer hung up: a beat to every peer of that hop finds out which, in this turn of the loop."""
        for hop, socket in ((Hop.WORKER, self._workers), (Hop.FRONTEND, self._frontends)):
            if socket.disconnected():
                self._engine.probe(hop, now)

    def _gone(self, hop: Hop, peer: bytes, now: float) -> None:
        if hop is Hop.WORKER:
            self._engine.worker_gone(peer, now)
        else:
            self._engine.frontend_gone(peer)

    def _write_state(self) -> None:
        """Counts of blocks and requests to `state.json`, complete or not at all."""
        self._dump = False
        path = self._run_dir / "state.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self._engine.state(), indent=1) + "\n")
        draft.replace(path)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _ask_dump(self, _signal: int, _frame: FrameType | None) -> None:
        self._dump = True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scheduler_svc.core_process",
        description="The core process of a Baton scheduler. Started by `python -m scheduler_svc`; SIGUSR1 "
        "writes counts of blocks and requests to RUN_DIR/state.json.",
    )
    defaults = EngineConfig("")
    parser.add_argument("--run-dir", type=Path, required=True, help="private directory of the ipc sockets")
    parser.add_argument("--fingerprint", required=True, help="of the served checkpoint; workers must agree")
    parser.add_argument("--max-queue", type=int, default=defaults.max_queue, help="requests that may wait")
    parser.add_argument(
        "--worker-wait-s",
        type=float,
        default=defaults.worker_wait_s,
        help="how long a request whose worker was lost waits for another, seconds",
    )
    parser.add_argument("--log-level", default="info", choices=logs.LEVELS)
    return parser.parse_args()


def main() -> int:
    """Runs the core; 0 after SIGTERM, 1 where the sockets cannot be bound."""
    arguments = _arguments()
    logs.configure(arguments.log_level, "core")
    config = EngineConfig(
        fingerprint=arguments.fingerprint,
        max_queue=arguments.max_queue,
        worker_wait_s=arguments.worker_wait_s,
    )
    try:
        process = CoreProcess(arguments.run_dir, config)
    except (EndpointError, OSError) as error:
        logger.error("cannot start: %s", error)
        return 1
    process.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
