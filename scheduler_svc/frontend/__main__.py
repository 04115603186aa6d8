"""`python -m scheduler_svc.frontend`: one front-end, started by the supervisor with the supervisor's options.

Prints its address on stdout once it is bound. SIGTERM drains. Ends when its parent does.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from baton_wire.transport import EndpointError, ipc_endpoint
from scheduler_svc import checkpoint, config, logs
from scheduler_svc.checkpoint import CheckpointError
from scheduler_svc.config import ServiceConfig
from scheduler_svc.frontend import model, server
from scheduler_svc.frontend.core_link import CoreLink
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.generate import Inference
from scheduler_svc.frontend.health import Health
from scheduler_svc.port import PortInUseError

_POLL_S = 0.05
_CORE_PATIENCE_S = 20.0  # for the core to start; the supervisor watches whether it lives
_LAST_WORDS_S = 1.0  # for the statuses of streams that the drain cut short
logger = logging.getLogger(__name__)


async def serve(options: ServiceConfig) -> None:
    """Serves until SIGTERM.

    Raises `CheckpointError`, `PortInUseError`, `EndpointError` or, where no core answers, `TimeoutError`.
    """
    found = checkpoint.load(checkpoint.locate(options.model), options.served_model_name)
    status = Health([server.INFERENCE])

    def report() -> None:
        ready = core.service is not None and core.service.ready_groups > 0
        status.set(serving=ready and not inference.draining)

    core = CoreLink(ipc_endpoint(options.run_dir / "frontends.ipc"), f"frontend-{os.getpid()}", report)
    inference = Inference(model.load(found, options.default_max_tokens), core)
    grpc_server = server.build(inference, status, shares_port=options.frontends > 1)
    address = server.bind(grpc_server, options.listen)
    core.start()
    await asyncio.wait_for(core.wait_connected(), _CORE_PATIENCE_S)
    await grpc_server.start()
    gc.collect()
    gc.freeze()  # or a full collection, which walks all that was loaded, would stop streams for tens of ms
    print(address, flush=True)
    await _until_told_to_stop()
    inference.draining = True
    report()
    await _drain(core, options.drain_grace_s)
    await grpc_server.stop(_LAST_WORDS_S)
    core.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop, or None where there is none: it is for Linux only."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _until_told_to_stop() -> None:
    """Returns at SIGTERM, or when the parent is gone. A terminal's Ctrl-C is for the supervisor."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:
        try:
            await asyncio.wait_for(stop.wait(), _POLL_S)
        except TimeoutError:
            continue


async def _drain(core: CoreLink, grace_s: float) -> None:
    """Waits for open streams; those that are left at the end of the grace are told to go elsewhere."""
    deadline = time.monotonic() + grace_s
    logger.info("draining: %d streams, %g s at most", core.open_streams, grace_s)
    while core.open_streams and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
    core.fail_streams(RequestError(Reason.DRAINING, "this server went away before the end; try another"))


def main() -> int:
    """The process; its exit status."""
    options = config.parse(None, "scheduler_svc.frontend")
    logs.configure(options.log_level, "frontend")
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(options))
    except CheckpointError as error:
        logger.error("%s", error)
        return os.EX_NOINPUT
    except PortInUseError as error:
        logger.error("%s", error)
        return os.EX_UNAVAILABLE
    except EndpointError as error:
        logger.error("%s", error)
        return os.EX_CANTCREAT
    except TimeoutError:
        logger.error("the core does not answer in %g s", _CORE_PATIENCE_S)
        return os.EX_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
