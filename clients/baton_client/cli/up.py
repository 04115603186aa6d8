"""`baton up`: start the scheduler and its workers, and stop them together."""

import argparse
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baton_client.claim import Claim, running
from baton_client.cli.console import spinner
from baton_client.cli.hints import command, lines_to_try
from baton_client.cli.options import Commands, add_command
from baton_client.client import Client
from baton_client.errors import BatonError
from baton_client.stack import DEMO_MODEL_NAME, Stack, StackError, StackOptions, default_run_dir, demo_model

_EXAMPLES = """\
  baton up                                       the demo model, in a source tree
  baton up --model ~/models/Qwen3-0.6B           a checkpoint folder; Ctrl-C stops it
  baton up --model Qwen/Qwen3-0.6B --detach      from the hub, in the background; 'baton down' stops it
  baton up --model DIR --workers 2 --max-num-seqs 128
  baton up --model DIR --listen 127.0.0.1:0      on a free port
"""

_WORKER_OPTIONS = {
    "--device": ("cpu|cuda|auto", "where the model runs"),
    "--dtype": ("auto|float32|bfloat16", "the type of its arithmetic"),
    "--max-num-seqs": ("N", "sequences that run at once"),
    "--max-num-batched-tokens": ("N", "tokens of one step"),
    "--max-model-len": ("N", "the longest sequence, in tokens"),
    "--kvcache-block-size": ("N", "token positions of a block"),
    "--num-kvcache-blocks": ("N", "blocks of the key-value cache"),
    "--gpu-memory-utilization": ("F", "the part of the device's memory to use"),
    "--attention-backend": ("auto|torch|triton|flash_attn", "how attention is computed"),
    "--load-format": ("auto|dummy", "dummy: random weights, for measurements"),
    "--tensor-parallel-size": ("N", "ranks that share one model"),
}
_WORKER_FLAGS = {
    "--enforce-eager": "no CUDA graphs",
    "--deterministic": "a request's tokens do not depend on what runs beside it",
}
_SCHEDULER_OPTIONS = {
    "--served-model-name": ("NAME", "the name under which the model is served"),
    "--max-queue": ("N", "requests that may wait"),
    "--default-max-tokens": ("N", "the cap on answers whose request sets none"),
    "--drain-grace-s": ("S", "how long running answers may take when stopping"),
}


def add_parser(commands: Commands) -> None:
    """Add `baton up`."""
    parser = add_command(commands, "up", _run, summary="start a local stack", examples=_EXAMPLES)
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder or hub id (default: the demo model)"
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="where to serve (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="copies of the model (default: 1)"
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=default_run_dir(),
        metavar="DIR",
        help="sockets and logs (default: %(default)s)",
    )
    parser.add_argument("--detach", action="store_true", help="return once it serves; 'baton down' stops it")
    parser.add_argument(
        "--verbose", action="store_true", help="show the logs instead of keeping them in the run dir"
    )
    parser.add_argument(
        "--ready-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="how long it may take (default: %(default)g)",
    )
    for title, options in (("worker", _WORKER_OPTIONS), ("scheduler", _SCHEDULER_OPTIONS)):
        group = parser.add_argument_group(f"{title} options (unset: its defaults)")
        for option, (metavar, text) in options.items():
            kind = float if metavar == "S" else str
            group.add_argument(option, type=kind, metavar=metavar, help=text)
        if title == "worker":
            for flag, text in _WORKER_FLAGS.items():
                group.add_argument(flag, action="store_true", help=text)
    parser.set_defaults(address="")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise BatonError("--workers: at least 1 is needed")
    if arguments.model is None:
        model = demo_model()
        if model is None:
            raise BatonError("--model is needed: a checkpoint folder, or a hub id such as Qwen/Qwen3-0.6B")
        arguments.model = str(model)
        arguments.served_model_name = arguments.served_model_name or DEMO_MODEL_NAME
    return _run_detached(arguments) if arguments.detach else _run_attached(arguments)


def _run_attached(arguments: argparse.Namespace) -> int:
    """Start the stack, then watch it until a signal; the claim on the run directory tells others about it."""
    claim = Claim(arguments.run_dir, arguments.model)
    try:
        with _signals() as stopping:
            with spinner("starting") as show:
                stack = Stack.start(_options(arguments), show, should_stop=stopping.is_set)
            with contextlib.ExitStack() as cleanup:
                cleanup.callback(stack.stop, drain=False)  # in haste, unless it has been stopped in peace
                print(lines_to_try(_supports_chat(stack.address), stack.address), flush=True)
                claim.publish(stack.address)
                while not stopping.wait(0.2):
                    stack.check()
                with spinner("stopping: running answers may finish (Ctrl-C again: now)"):
                    stack.stop()
    finally:
        claim.release()
    return 0


def _run_detached(arguments: argparse.Namespace) -> int:
    """Start `baton up` in the background and wait until it serves."""
    Claim(arguments.run_dir, arguments.model).release()  # refuse at once if a stack runs there
    log = arguments.run_dir / "up.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "baton_client.cli", "up", *_attached_arguments(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with spinner("starting in the background"):
            while not ((found := running(arguments.run_dir)) and found.pid == child.pid and found.address):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(0.1)
                    raise StackError(_last_words(log), exit_code=code or 70)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    print(lines_to_try(_supports_chat(found.address), found.address))
    print(f"logs: {arguments.run_dir}/*.log   stop: {command('down', arguments.run_dir)}")
    return 0


def _options(arguments: argparse.Namespace) -> StackOptions:
    return StackOptions(
        model=arguments.model,
        listen=arguments.listen,
        workers=arguments.workers,
        run_dir=arguments.run_dir,
        worker_args=_worker_arguments(arguments),
        scheduler_args=_given(arguments, _SCHEDULER_OPTIONS),
        ready_timeout_s=arguments.ready_timeout,
        drain_s=(30.0 if arguments.drain_grace_s is None else arguments.drain_grace_s) + 5.0,
        verbose=arguments.verbose,
    )


def _worker_arguments(arguments: argparse.Namespace) -> list[str]:
    flags = [flag for flag in _WORKER_FLAGS if getattr(arguments, flag[2:].replace("-", "_"))]
    return [*_given(arguments, _WORKER_OPTIONS), *flags]


def _given(arguments: argparse.Namespace, options: dict[str, tuple[str, str]]) -> list[str]:
    """Return those of the pass-through options that were given, as a command line."""
    given = {option: getattr(arguments, option[2:].replace("-", "_")) for option in options}
    return [word for option, value in given.items() if value is not None for word in (option, str(value))]


def _attached_arguments(arguments: argparse.Namespace) -> list[str]:
    """Return the command line of the same `baton up`, not detached."""
    return [
        *("--model", arguments.model),
        *("--listen", arguments.listen),
        *("--workers", str(arguments.workers)),
        *("--run-dir", str(arguments.run_dir)),
        *("--ready-timeout", str(arguments.ready_timeout)),
        *(["--verbose"] if arguments.verbose else []),
        *_worker_arguments(arguments),
        *_given(arguments, _SCHEDULER_OPTIONS),
    ]


def _supports_chat(address: str) -> bool:
    with Client(address) as client:
        return client.model().supports_chat


def _last_words(log: Path) -> str:
    """Return what a background `baton up` said when it failed, without its progress."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if " …" not in line]
    return "\n".join(lines).removeprefix("baton: ") or "the background process ended without a word"


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT, SIGTERM or SIGHUP sets; a second signal raises KeyboardInterrupt.

    SIGUSR1 does nothing here, nor to the parts, which inherit that, until they have a use for it.
    """
    stopping = threading.Event()

    def on_signal(*_: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    wanted: dict[signal.Signals, Any] = {signal.SIGUSR1: signal.SIG_IGN}
    wanted |= dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), on_signal)
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
