"""Configuration of the service: resolved once from the command line, frozen, every value checked here.

Supervisor and front-end take the same options: the supervisor hands on its own.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton_wire.transport import default_run_dir
from scheduler_svc import logs

_DESCRIPTION = """\
Serve one language model over gRPC. Starts the scheduler core and a front-end and watches over them; workers
(`python -m gpu_worker --model MODEL`) dial in through the run directory, before or after this, on their own.
"""

_EPILOG = """\
When the port is bound, one line on stdout says where: `baton: listening on HOST:PORT (…)`. Logs go to stderr.
SIGTERM or Ctrl-C drains: new calls are refused, running streams end within the grace; a second one stops at
once. Exit status: 0 after draining, 2 wrong option, 66 checkpoint missing or broken, 70 a part of the service
died (the reason is on stderr), 73 run directory not usable or in use.
"""


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """What to serve and how. Raises `ValueError` that names the field.

    `model`: checkpoint directory, or a hub id. `listen`: host:port, port 0 picks a free one. `frontends`:
    processes that serve gRPC there. `max_queue`: requests that may wait. `worker_wait_s`: how long a request
    whose worker was lost waits for another. `default_max_tokens`: cap of a request that sets none.
    `drain_grace_s`: how long streams may go on after SIGTERM.
    """

    model: str
    listen: str = "127.0.0.1:50051"
    run_dir: Path = field(default_factory=default_run_dir)
    served_model_name: str | None = None
    frontends: int = 1
    max_queue: int = 1024
    worker_wait_s: float = 30.0
    default_max_tokens: int = 1024
    drain_grace_s: float = 30.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: must name a checkpoint directory or a hub id")
        port = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^:\s\[\]]+):(\d{1,5})", self.listen)
        if port is None or int(port[1]) > 65_535:
            raise ValueError(f"listen: {self.listen!r} is not HOST:PORT (IPv6 as [::1]:PORT)")
        for name in ("frontends", "max_queue", "default_max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        for name in ("worker_wait_s", "drain_grace_s"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name}: {getattr(self, name)} is not a time in seconds")
        if self.log_level not in logs.LEVELS:
            raise ValueError(f"log_level: {self.log_level!r} is none of {', '.join(logs.LEVELS)}")

    def arguments(self) -> list[str]:
        """The command line that resolves to this configuration."""
        named = [] if self.served_model_name is None else [f"--served-model-name={self.served_model_name}"]
        return [
            f"--model={self.model}",
            f"--listen={self.listen}",
            f"--run-dir={self.run_dir}",
            f"--frontends={self.frontends}",
            f"--max-queue={self.max_queue}",
            f"--worker-wait-s={self.worker_wait_s}",
            f"--default-max-tokens={self.default_max_tokens}",
            f"--drain-grace-s={self.drain_grace_s}",
            f"--log-level={self.log_level}",
            *named,
        ]


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = ServiceConfig("unset")
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint directory, or a hub id (OWNER/NAME)")
    add(
        "--listen",
        default=default.listen,
        metavar="HOST:PORT",
        help="where gRPC is served; port 0 picks a free one (default %(default)s)",
    )
    add(
        "--run-dir",
        type=Path,
        default=default.run_dir,
        metavar="DIR",
        help="private directory where workers meet the scheduler; one scheduler each (default %(default)s)",
    )
    add("--served-model-name", metavar="NAME", help="name told to clients (default: the directory's)")
    add(
        "--frontends",
        type=int,
        default=default.frontends,
        metavar="K",
        help="front-end processes that share the port; the kernel spreads connections (default %(default)s)",
    )
    add(
        "--max-queue",
        type=int,
        default=default.max_queue,
        metavar="N",
        help="requests that may wait; beyond it RESOURCE_EXHAUSTED (default %(default)s)",
    )
    add(
        "--worker-wait-s",
        type=float,
        default=default.worker_wait_s,
        metavar="S",
        help="how long a stream whose worker was lost waits for another (default %(default)g)",
    )
    add(
        "--default-max-tokens",
        type=int,
        default=default.default_max_tokens,
        metavar="N",
        help="cap on generated tokens where a request sets none (default %(default)s)",
    )
    add(
        "--drain-grace-s",
        type=float,
        default=default.drain_grace_s,
        metavar="S",
        help="how long running streams may go on after SIGTERM (default %(default)g)",
    )
    add("--log-level", default=default.log_level, choices=logs.LEVELS, help="default %(default)s")
    return parser


def parse(arguments: Sequence[str] | None, program: str) -> ServiceConfig:
    """The configuration on the command line; exits with status 2 and a message where it is wrong."""
    parser = _parser(program)
    options = vars(parser.parse_args(arguments))
    options["run_dir"] = options["run_dir"].absolute()
    try:
        return ServiceConfig(**options)
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        parser.error(f"argument --{name.replace('_', '-')}: {problem}")
