"""The worker's process: phases, the loop over plans, and leaving."""

import gc
import logging
import os
import signal
import sys
import time
from types import FrameType

from baton_wire.errors import WireError
from baton_wire.fingerprint import fingerprint
from baton_wire.transport import EndpointError
from baton_wire.worker_session import Refused, WorkerSession
from gpu_worker import build
from gpu_worker.config import WorkerConfig
from gpu_worker.dialling import Dialling
from gpu_worker.errors import CheckpointError, ConfigError, WorkerError
from gpu_worker.tracer import Tracer
from gpu_worker.watchdog import Watchdog

log = logging.getLogger(__name__)

_POLL_S = 0.1
_SPIN_S = 5e-3  # of looks one after the other at a busy device; first tokens wait for what a nap adds …
_NAP_S = 20e-6  # … between looks after that: with the kernel's slack and waking up, 80 to 110 us
_REFUSED_EXIT_CODE = 69


class _Stop:
    """Set by the first SIGTERM or SIGINT; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def main(config: WorkerConfig) -> int:
    """Runs one rank until it is told to leave; the exit code. Says on stderr what went wrong."""
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s worker %(message)s",
    )
    try:
        return _run(config)
    except Refused as refused:
        return _fail(f"the scheduler refused this worker: {refused}", _REFUSED_EXIT_CODE)
    except WorkerError as error:
        return _fail(str(error), error.exit_code)
    except EndpointError as error:
        return _fail(str(error), ConfigError.exit_code)
    except WireError as error:
        return _fail(f"the scheduler speaks another contract: {error}", WorkerError.exit_code)


def _fail(why: str, code: int) -> int:
    print(f"gpu_worker: {why}", file=sys.stderr, flush=True)
    return code


def _run(config: WorkerConfig) -> int:
    watchdog = Watchdog()
    with watchdog.phase("loading the weights", config.load_timeout_s):
        loaded = build.load_model(config)
        try:
            digest = fingerprint(loaded.folder)
        except OSError as error:
            raise CheckpointError(str(error)) from error
    with watchdog.phase("warming up", config.warmup_timeout_s):
        runner = build.make_runner(config, loaded)
    gc.collect()
    gc.freeze()  # what is here stays: no collection needs to look at it again, in the middle of a step
    stop = _Stop()

    def reset() -> None:
        log.warning("session lost, dialling again")
        runner.reset()

    session = WorkerSession(config.endpoint, build.hello(config, loaded, runner.limits, digest), reset)
    log.info("dialling %s group=%s", config.endpoint, config.group)
    tracer = Tracer(config.trace_dir, config.trace_steps)
    serve(session, runner, watchdog, config.step_timeout_s, stop, tracer, Dialling(config.endpoint))
    session.leave()
    log.info("left")
    return 0


def serve(
    session: WorkerSession,
    runner: build.AnyRunner,
    watchdog: Watchdog,
    step_timeout_s: float,
    stop: _Stop,
    tracer: Tracer,
    dialling: Dialling,
) -> None:
    """The loop: plans in, results out, until asked to stop; across sessions, each with a fresh table.

    A step has `step_timeout_s` from when it is the oldest not through: a device may hang without raising.
    """
    epoch = 0
    moved_s = 0.0  # when a plan or a result last came

    def reply() -> bool:
        """Sends the results that are there; whether there were any."""
        results = runner.finished()
        for result in results:
            session.reply(result)
        if results:
            watchdog.end()
            if runner.outstanding:
                watchdog.begin(f"step {results[-1].step + 1}", step_timeout_s)
        return bool(results)

    while not stop.asked:
        plans = session.poll(0.0 if runner.outstanding else _POLL_S)
        if session.epoch != epoch:
            epoch = session.epoch
            watchdog.end()  # the runner has forgotten the steps of the session that was lost
            if epoch:
                log.info("session epoch=%d", epoch)
        dialling.note(session.hears)
        for plan in plans:
            tracer.before_step()
            if not runner.outstanding:
                watchdog.begin(f"step {plan.step}", step_timeout_s)
            runner.submit(plan)
            reply()  # at once: the core sends the next plan while this one's successor runs
        if plans or reply():
            moved_s = time.monotonic()
        elif runner.outstanding:
            _leave_device_alone(moved_s)


def _leave_device_alone(moved_s: float) -> None:
    """Between two looks at a busy device, where nothing has come since `moved_s`."""
    if time.monotonic() - moved_s < _SPIN_S:
        os.sched_yield()
    else:
        time.sleep(_NAP_S)
