"""From a configuration to a runner that is ready: read, load, test, size, warm up."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from baton_kernels import reference
from baton_wire.columns import TOKEN
from baton_wire.hello import WorkerHello
from baton_wire.plan import ADMISSION, APPEND, CHUNK, Plan
from baton_wire.result import Result
from gpu_worker import loader, models
from gpu_worker.attention import AttentionShape, Case, HostAttention, choose
from gpu_worker.config import WorkerConfig
from gpu_worker.errors import ConfigError
from gpu_worker.exactness import fix_rows, row_multiple
from gpu_worker.fields import Fields
from gpu_worker.layers.parts import parts_of
from gpu_worker.limits import Limits, cache_blocks
from gpu_worker.models import Model, ModelConfig
from gpu_worker.runner import Runner

log = logging.getLogger(__name__)

_FALLBACK_MULTIPLE = 8
_SMALL_MODEL = 10_000_000  # parameters


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights, and where it came from."""

    folder: Path
    config: ModelConfig
    model: Model
    dtype: torch.dtype


def load_model(config: WorkerConfig) -> Loaded:
    """Finds, checks and reads the checkpoint.

    Raises `CheckpointError`, or `ConfigError` where the attention backend cannot serve this model.
    """
    started = time.monotonic()
    folder = loader.locate(config.model)
    model_config = models.read_config(Fields(folder / "config.json"))
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    backend = choose(config.attention_backend, _case(config, model_config, dtype))  # refuses early
    log.info("attention backend=%s asked=%s", backend.__name__, config.attention_backend)
    with torch.device(config.device):
        model = models.build(model_config, dtype)
    _set_threads(config.threads, model)
    if config.load_format == "dummy":
        loader.fill(model)
    else:
        loader.load(model, folder)
    log.info("weights loaded model=%s dtype=%s seconds=%.1f", folder, dtype, time.monotonic() - started)
    return Loaded(folder, model_config, model, dtype)


def _case(config: WorkerConfig, c: ModelConfig, dtype: torch.dtype) -> Case:
    shape = AttentionShape(c.heads, c.kv_heads, c.head_dim, config.block_size)
    return Case(shape, dtype, torch.device(config.device), config.deterministic)


def _set_threads(asked: int | None, model: Model) -> None:
    """Operations of a small model are over before a second thread has woken up."""
    size = sum(view.numel() for _, view in parts_of(model))
    if asked is not None or size < _SMALL_MODEL:
        torch.set_num_threads(asked or 1)


class AnyRunner(Protocol):
    """What the process needs of a runner: steps in, results out when they are through, in step order."""

    @property
    def limits(self) -> Limits:
        """What it can hold."""

    @property
    def outstanding(self) -> int:
        """Steps that may not be through yet."""

    def submit(self, plan: Plan) -> None:
        """Starts a step. Raises `PlanError` where the plan does not fit the slot table."""

    def finished(self) -> list[Result]:
        """Results of steps that are through; does not wait."""

    def reset(self) -> None:
        """Forgets every sequence, and every step not through."""


def make_runner(config: WorkerConfig, loaded: Loaded) -> AnyRunner:
    """The runner for the configured device, warmed up. Raises `ConfigError`."""
    if config.deterministic:
        fix_rows(loaded.model)
    if config.device == "cpu":
        runner: AnyRunner = _make_cpu_runner(config, loaded)
    else:
        from gpu_worker.cuda.build import make_runner as make_cuda_runner  # needs triton

        runner = make_cuda_runner(config, loaded)
    _warn_of_a_small_cache(runner.limits)
    return runner


def _warn_of_a_small_cache(limits: Limits) -> None:
    """Such a worker serves, but nothing that would not fit even alone: the scheduler refuses that."""
    if limits.max_sequence < limits.max_model_len:
        log.warning(
            "this worker takes no requests of more than %d tokens: "
            "blocks=%d block_size=%d; max_model_len=%d needs blocks=%d",
            *(limits.max_sequence, limits.num_blocks, limits.block_size, limits.max_model_len),
            -(-(limits.max_model_len - 1) // limits.block_size),
        )


def _make_cpu_runner(config: WorkerConfig, loaded: Loaded) -> Runner:
    """Sizes the cache, tests exactness and warms up."""
    c, model = loaded.config, loaded.model
    case = _case(config, c, loaded.dtype)
    attention: HostAttention = choose(config.attention_backend, case)(case.shape, case.dtype, case.device)
    limits = _limits(config, loaded, attention)
    rotary = reference.rotary_table(limits.max_model_len, c.head_dim, c.rope_theta)
    cache = attention.cache(c.layers, limits.num_blocks)
    runner = Runner(model, attention, cache, rotary, limits)
    _warm_up(runner)
    log.info(
        "ready slots=%d blocks=%d block_size=%d max_model_len=%d step_tokens=%d row_multiple=%d threads=%d",
        *(limits.max_slots, limits.num_blocks, limits.block_size, limits.max_model_len),
        *(limits.max_tokens_per_step, limits.row_multiple, torch.get_num_threads()),
    )
    return runner


def hello(config: WorkerConfig, loaded: Loaded, limits: Limits, fingerprint: str) -> WorkerHello:
    """What this worker says of itself."""
    return WorkerHello(
        group=config.group,
        rank=0,
        ranks=1,
        fingerprint=fingerprint,
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        max_slots=limits.max_slots,
        max_model_len=limits.max_model_len,
        max_tokens_per_step=limits.max_tokens_per_step,
        vocab_size=loaded.config.vocab_size,
        row_multiple=limits.row_multiple,
    )


def _limits(config: WorkerConfig, loaded: Loaded, attention: HostAttention) -> Limits:
    c = loaded.config
    length = config.max_model_len or c.max_positions
    if length > c.max_positions:
        raise ConfigError(f"--max-model-len {length}: the model was made for {c.max_positions}")
    bytes_per_block = 2 * c.layers * c.kv_heads * c.head_dim * config.block_size * loaded.dtype.itemsize
    useful = config.max_num_seqs * -(-length // config.block_size)
    multiple = row_multiple(loaded.model, config.max_num_batched_tokens, config.max_num_seqs)
    for what, exact in (("linear layers", multiple is not None), ("attention", attention.is_exact())):
        if not exact and config.deterministic:
            raise ConfigError(f"--deterministic: {what} round by the number of rows on this machine")
        if not exact:
            log.warning("tokens may depend on the batch: %s round by the number of rows here", what)
    return Limits(
        max_slots=config.max_num_seqs,
        max_tokens_per_step=config.max_num_batched_tokens,
        max_model_len=length,
        block_size=config.block_size,
        num_blocks=cache_blocks(config.num_kvcache_blocks, bytes_per_block, useful),
        row_multiple=multiple or _FALLBACK_MULTIPLE,
    )


def _warm_up(runner: Runner) -> None:
    """A prompt and a few tokens through the whole path, so that the first request finds everything made."""
    limits = runner.limits
    room = min(limits.num_blocks * limits.block_size, limits.max_model_len, limits.max_tokens_per_step) - 1
    if room < 1:
        return
    count = min(room, 2 * limits.row_multiple)
    blocks = -(-(count + 1) // limits.block_size)
    admission = np.zeros(1, ADMISSION)
    admission["max_length"] = limits.max_model_len + 1
    runner.execute(
        Plan(
            step=1,
            row_bound=1,
            bucket=limits.row_multiple,
            admissions=admission,
            appends=np.array([(0, block) for block in range(blocks)], APPEND),
            chunks=np.array([(0, 1, 0, count)], CHUNK),
            chunk_tokens=np.zeros(count, TOKEN),
        )
    )
    runner.execute(Plan(step=2, row_bound=1, bucket=limits.row_multiple))
    runner.reset()
