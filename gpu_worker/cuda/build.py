"""From a loaded model to a CUDA runner that is ready: profile, size the cache, capture."""

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from baton_kernels import reference
from baton_wire.columns import TOKEN
from baton_wire.plan import ADMISSION, APPEND, CHUNK, Plan
from gpu_worker.attention import AttentionShape, Case, DeviceAttention, choose
from gpu_worker.config import WorkerConfig
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.errors import ConfigError
from gpu_worker.limits import Limits

if TYPE_CHECKING:
    from gpu_worker.build import Loaded

log = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 30  # for captured graphs, the driver, and what fragments
_PROFILE_ROWS = 8  # slots of the profile run


def make_runner(config: WorkerConfig, loaded: "Loaded") -> CudaRunner:
    """Sizes the cache from a profile run, compiles, captures. Raises `ConfigError`."""
    c = loaded.config
    started = time.monotonic()
    shape = AttentionShape(c.heads, c.kv_heads, c.head_dim, config.block_size)
    device = torch.device(config.device)
    case = Case(shape, loaded.dtype, device, config.deterministic)
    attention: DeviceAttention = choose(config.attention_backend, case)(
        shape, loaded.dtype, device, deterministic=config.deterministic
    )
    length = config.max_model_len or c.max_positions
    rotary = reference.rotary_table(length, c.head_dim, c.rope_theta).to(device)
    blocks = config.num_kvcache_blocks or _blocks(config, loaded, attention, rotary, length)
    runner = _runner(config, loaded, attention, rotary, length, blocks, config.max_num_seqs)
    _warm_up(runner)
    runner.prepare(graphs=not config.enforce_eager)
    runner.reset()
    log.info(
        "ready slots=%d blocks=%d block_size=%d max_model_len=%d step_tokens=%d graphs=%s seconds=%.1f",
        *(config.max_num_seqs, blocks, config.block_size, length, config.max_num_batched_tokens),
        *(not config.enforce_eager, time.monotonic() - started),
    )
    return runner


def _runner(
    config: WorkerConfig,
    loaded: "Loaded",
    attention: DeviceAttention,
    rotary: Tensor,
    length: int,
    blocks: int,
    slots: int,
) -> CudaRunner:
    limits = Limits(
        max_slots=slots,
        max_tokens_per_step=max(config.max_num_batched_tokens, slots),
        max_model_len=length,
        block_size=config.block_size,
        num_blocks=blocks,
        row_multiple=1,
    )
    cache = attention.cache(loaded.config.layers, blocks)
    return CudaRunner(loaded.model, attention, cache, rotary, limits, vocabulary=loaded.config.vocab_size)


def _blocks(
    config: WorkerConfig,
    loaded: "Loaded",
    attention: DeviceAttention,
    rotary: Tensor,
    length: int,
) -> int:
    """Blocks that fit beside weights and the largest step, found by running one."""
    c = loaded.config
    per_block = 2 * c.layers * c.kv_heads * c.head_dim * config.block_size * loaded.dtype.itemsize
    need = -(-(config.max_num_batched_tokens + 1) // config.block_size) + _PROFILE_ROWS
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner = _runner(config, loaded, attention, rotary, length, need, _PROFILE_ROWS)
    held = torch.cuda.memory_allocated() - before
    _warm_up(runner, config.max_num_batched_tokens)
    peak = torch.cuda.max_memory_allocated() - before - held
    del runner
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    room = int(total * config.gpu_memory_utilization) - (total - free) - peak - _SPARE_BYTES
    blocks = room // per_block
    if blocks < 1:
        raise ConfigError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization}: {total >> 20} MiB in all, "
            f"{free >> 20} MiB free beside the weights, a step takes {peak >> 20} MiB: no room for a cache"
        )
    useful = config.max_num_seqs * -(-length // config.block_size)
    log.info(
        "profile total_mib=%d free_mib=%d step_mib=%d cache_mib=%d blocks=%d useful=%d",
        *(total >> 20, free >> 20, peak >> 20, (min(blocks, useful) * per_block) >> 20, blocks, useful),
    )
    return min(blocks, useful)


def _warm_up(runner: CudaRunner, tokens: int = 64) -> None:
    """A prompt of `tokens` and two decode steps: compiles every kernel of the path."""
    limits = runner.limits
    room = min(limits.num_blocks * limits.block_size, limits.max_model_len) - 3
    count = max(1, min(tokens, room, limits.max_tokens_per_step))
    blocks = -(-(count + 3) // limits.block_size)
    admission = np.zeros(1, ADMISSION)
    admission["max_length"] = limits.max_model_len + 1
    first = Plan(
        step=1,
        row_bound=1,
        bucket=1,
        admissions=admission,
        appends=np.array([(0, block) for block in range(blocks)], APPEND),
        chunks=np.array([(0, 1, 0, count)], CHUNK),
        chunk_tokens=np.zeros(count, TOKEN),
    )
    for plan in (first, Plan(step=2, row_bound=1, bucket=1), Plan(step=3, row_bound=1, bucket=1)):
        runner.execute(plan)
    runner.reset()
