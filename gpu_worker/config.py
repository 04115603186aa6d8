"""The command line: parsed, checked and frozen once; every error names the argument."""

import argparse
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from baton_wire.transport import EndpointError, check_endpoint, default_run_dir, ipc_endpoint
from gpu_worker.errors import ConfigError

_SOCKET = "workers.ipc"
_MAX_BLOCK_SIZE = 1 << 12  # beyond, the scheduler refuses a worker
_MAX_SLOTS = {"cpu": 1 << 16, "cuda": 1 << 12}  # on CUDA as `baton_kernels.decode_plan.MAX_ROWS`
# What is not given. Blocks of 64 positions: from there on attention on a GPU reads them by bulk copies.
_DEFAULTS = {
    "cpu": {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kvcache_block_size": 16},
    "cuda": {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "kvcache_block_size": 64},
}
_FLASH_ATTN_BLOCK_SIZE = 256  # the least that flash-attn takes

_EPILOG = """\
A worker holds one copy of a model and does what the scheduler's plans say. It dials the scheduler for as
long as it takes, so either may be started first; both must be given the same checkpoint. More workers on the
same run directory mean more capacity. A worker survives a restart of the scheduler: it dials again.

--deterministic: a request gets the same tokens alone and in any batch, its prompt in one piece or in many, on
the same device with the same options. On CPU that includes what was cached before and what is computed again
after a preemption, and is refused where this machine's products round by the number of rows (without the
option: a warning). On a GPU an answer's tokens are computed by another kernel than a prompt's, equal up to
rounding: what is read from the cache of an earlier answer, or recomputed after a preemption, may differ.

examples:
  python -m gpu_worker --model ./demo/model
  python -m gpu_worker --model Qwen/Qwen3-0.6B --max-model-len 4096 --max-num-seqs 32
  python -m gpu_worker --model ./m --run-dir /tmp/b --num-kvcache-blocks 512   # a cache of 512 · 16 tokens

exit codes: 0 after SIGTERM or SIGINT; 2 the command line is wrong; 64 the value of an argument is; 65 the
checkpoint is; 69 the scheduler refused this worker; 70 anything else, a deadline that passed among it. The
last line on stderr says why."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What the worker is to do. `num_kvcache_blocks`, `max_model_len`: None for as much as makes sense."""

    model: str
    endpoint: str
    group: str
    device: str
    dtype: str
    load_format: str
    enforce_eager: bool
    deterministic: bool
    gpu_memory_utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    block_size: int
    num_kvcache_blocks: int | None
    attention_backend: str
    threads: int | None
    load_timeout_s: float
    warmup_timeout_s: float
    step_timeout_s: float
    trace_dir: Path | None
    trace_steps: int
    log_level: str


def parse(arguments: list[str]) -> WorkerConfig:
    """The configuration that `arguments` ask for. `ConfigError` for values; argparse exits for syntax."""
    a = _parser().parse_args(arguments)
    if a.tensor_parallel_size != 1:
        raise ConfigError(f"--tensor-parallel-size {a.tensor_parallel_size}: only 1 is offered so far")
    device = _device(a.device)
    if a.attention_backend == "flash_attn" and a.kvcache_block_size is None:
        a.kvcache_block_size = _FLASH_ATTN_BLOCK_SIZE
    for name, value in _DEFAULTS[device].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    if a.max_num_seqs > _MAX_SLOTS[device]:
        raise ConfigError(f"--max-num-seqs {a.max_num_seqs}: at most {_MAX_SLOTS[device]} on {device}")
    if a.max_num_batched_tokens < a.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {a.max_num_batched_tokens}: below --max-num-seqs {a.max_num_seqs}, "
            "but every sequence takes one token of a step"
        )
    if a.kvcache_block_size > _MAX_BLOCK_SIZE:
        raise ConfigError(f"--kvcache-block-size {a.kvcache_block_size}: at most {_MAX_BLOCK_SIZE}")
    most_threads = 4 * (os.cpu_count() or 1)
    if a.threads is not None and a.threads > most_threads:
        raise ConfigError(f"--threads {a.threads}: at most {most_threads} on this machine")
    if a.kvcache_block_size & (a.kvcache_block_size - 1):
        raise ConfigError(f"--kvcache-block-size {a.kvcache_block_size}: not a power of two")
    dtype = ("float32" if device == "cpu" else "bfloat16") if a.dtype == "auto" else a.dtype
    return WorkerConfig(
        model=a.model,
        endpoint=_endpoint(a.connect, (a.run_dir or default_run_dir()).absolute()),
        group=a.group or f"{socket.gethostname()}-{os.getpid()}",
        device=device,
        dtype=dtype,
        load_format=a.load_format,
        enforce_eager=a.enforce_eager,
        deterministic=a.deterministic,
        gpu_memory_utilization=a.gpu_memory_utilization,
        max_num_seqs=a.max_num_seqs,
        max_num_batched_tokens=a.max_num_batched_tokens,
        max_model_len=a.max_model_len,
        block_size=a.kvcache_block_size,
        num_kvcache_blocks=a.num_kvcache_blocks,
        attention_backend=a.attention_backend,
        threads=a.threads,
        load_timeout_s=a.load_timeout_s,
        warmup_timeout_s=a.warmup_timeout_s,
        step_timeout_s=a.step_timeout_s,
        trace_dir=a.trace_dir,
        trace_steps=a.trace_steps,
        log_level=a.log_level,
    )


def _endpoint(connect: str | None, run_dir: Path) -> str:
    try:
        if connect is None:
            return ipc_endpoint(run_dir / _SOCKET)
        check_endpoint(connect)
    except EndpointError as error:
        raise ConfigError(f"{'--run-dir' if connect is None else '--connect'}: {error}") from None
    return connect


def _device(asked: str) -> str:
    """`cpu`, or `cuda` where that is asked for and there is one. auto: the best there is."""
    if asked == "cpu":
        return "cpu"
    import torch  # slow to load, so not before it is needed

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError("--device cuda: torch finds no CUDA device")
    return "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_worker",
        description="One worker of Baton: loads a model and executes the scheduler's plans.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint directory (config.json, *.safetensors), or a hub id")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run-dir", type=Path, metavar="DIR", help=f"the scheduler's [{default_run_dir()}]")
    where.add_argument(
        "--connect", metavar="URL", help=f"the scheduler's worker endpoint, e.g. ipc:///run/b/{_SOCKET}"
    )
    add("--group", metavar="NAME", help="name of this copy of the model in logs [HOST-PID]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="[auto: float32 on CPU]",
    )
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, for benchmarks; only config.json and the tokenizer are read [auto]",
    )
    add("--max-num-seqs", type=_count, metavar="N", help="sequences that run at a time [64; GPU 256]")
    add("--max-num-batched-tokens", type=_count, metavar="N", help="tokens of one step [2048; GPU 8192]")
    add(
        "--max-model-len", type=_count, metavar="N", help="tokens of a sequence [what the model was made for]"
    )
    add(
        "--kvcache-block-size",
        type=_count,
        metavar="N",
        help="tokens of a cache block [16; GPU 64; flash_attn 256]",
    )
    add(
        "--num-kvcache-blocks", type=_count, metavar="N", help="blocks of the cache [at most 2 GiB of memory]"
    )
    add(
        "--gpu-memory-utilization",
        type=_share,
        default=0.9,
        metavar="X",
        help="for GPUs; no effect on CPU [0.9]",
    )
    add("--enforce-eager", action="store_true", help="no captured graphs; no effect on CPU")
    add("--deterministic", action="store_true", help="a request's tokens do not depend on others; see below")
    add(
        "--attention-backend",
        choices=("auto", "torch", "triton", "flash_attn"),
        default="auto",
        help="auto: torch on CPU, triton on CUDA; flash_attn: on CUDA, if that package is there [auto]",
    )
    add(
        "--threads",
        type=_count,
        metavar="N",
        help="of arithmetic on CPU [1 for small models, else all cores]",
    )
    add(
        "--tensor-parallel-size",
        type=_count,
        default=1,
        metavar="N",
        help="ranks of the group; only 1 so far",
    )
    add("--load-timeout-s", type=_seconds, default=1800.0, metavar="S", help="to read the weights [1800]")
    add("--warmup-timeout-s", type=_seconds, default=600.0, metavar="S", help="to warm up [600]")
    add("--step-timeout-s", type=_seconds, default=300.0, metavar="S", help="for one step [300]")
    add("--trace-dir", type=Path, metavar="DIR", help="SIGUSR1 traces the device there for some steps")
    add("--trace-steps", type=_count, default=200, metavar="N", help="steps of a trace [200]")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="[info]")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value
