"""Which backend serves, and why another cannot: a sentence for whoever started the worker, with what to do.

Asked before anything long begins; imports a backend only when it can serve.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.attention.interface import AttentionShape
from gpu_worker.errors import ConfigError

_FLASH_BLOCK_MULTIPLE = 256
_MIN_CAPABILITY = (8, 0)
_TWO_BYTES = (torch.float16, torch.bfloat16)
_WIDEST_HEAD, _NARROWEST_HEAD = 256, 16


@dataclass(frozen=True, slots=True)
class Case:
    """What a backend is to serve."""

    shape: AttentionShape
    dtype: torch.dtype
    device: torch.device
    deterministic: bool


def choose(name: str, case: Case) -> type[Any]:
    """The backend class called `name`; `auto`: triton on CUDA, torch on CPU.

    Raises `ConfigError`, saying why, where that backend cannot serve.
    """
    chosen = name if name != "auto" else "torch" if case.device.type == "cpu" else "triton"
    refuse = {"torch": _refuse_torch, "triton": _refuse_triton, "flash_attn": _refuse_flash}[chosen]
    if why := refuse(case):
        raise ConfigError(f"--attention-backend {name}{f' ({chosen})' * (name != chosen)}: {why}")
    if chosen == "torch":
        from gpu_worker.attention.torch_backend import TorchAttention

        return TorchAttention
    if chosen == "triton":
        from gpu_worker.attention.triton_backend import TritonAttention

        return TritonAttention
    from gpu_worker.attention.flash_backend import FlashAttention

    return FlashAttention


def _refuse_torch(case: Case) -> str | None:
    if case.device.type != "cpu":
        return f"it plans its steps on the host and is for CPU, not {case.device}: --attention-backend triton"
    return None


def _refuse_triton(case: Case) -> str | None:
    if why := _refuse_device(case.device):
        return why
    if case.dtype not in _TWO_BYTES:
        return f"its tiles are for numbers of two bytes, not {_name(case.dtype)}: --dtype bfloat16"
    width = case.shape.head_dim
    if width & (width - 1) or not _NARROWEST_HEAD <= width <= _WIDEST_HEAD:
        span = f"a power of two from {_NARROWEST_HEAD} to {_WIDEST_HEAD}"
        instead = "--device cpu"
        if width % 8 == 0 and width <= _WIDEST_HEAD:
            instead = f"--attention-backend flash_attn, or {instead}"
        return f"its kernels need a head_dim that is {span}, the model's is {width}: {instead}"
    return None


def _refuse_flash(case: Case) -> str | None:
    if why := _refuse_device(case.device) or _refuse_package():
        return why
    if case.dtype not in _TWO_BYTES:
        return f"it computes in float16 and bfloat16, not {_name(case.dtype)}: --dtype bfloat16"
    width = case.shape.head_dim
    if width % 8 or width > _WIDEST_HEAD:  # others of up to 256 it pads, by a copy of the cache at each call
        span = f"a multiple of 8 up to {_WIDEST_HEAD}"
        return f"it needs a head_dim that is {span}, the model's is {width}: --device cpu"
    if case.deterministic:
        return "it splits a row's keys by how many rows there are, so --deterministic needs triton"
    if case.shape.block_size % _FLASH_BLOCK_MULTIPLE:
        return (
            f"its cache blocks are multiples of {_FLASH_BLOCK_MULTIPLE} tokens, not {case.shape.block_size}: "
            f"--kvcache-block-size {_FLASH_BLOCK_MULTIPLE}, or --attention-backend triton"
        )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_device(device: torch.device) -> str | None:
    """What our kernels need, which every backend on CUDA uses."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, not {device}: --attention-backend torch"
    try:
        import baton_kernels.launch  # noqa: F401
    except ImportError as error:
        return f"the package triton does not load ({error}): pip install 'baton-serve[gpu]'"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        has, needs = (".".join(map(str, x)) for x in (capability, _MIN_CAPABILITY))
        return f"it needs compute capability {needs} or later, {device} has {has}: --device cpu"
    return None


def _refuse_package() -> str | None:
    """Whether flash-attn is there, loads, and has what we call."""
    instead = "or --attention-backend triton"
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return f"its package is not installed: pip install 'baton-serve[flash-attn]', {instead}"
        return f"the package flash-attn does not load ({error}): install it anew, {instead}"
    except ImportError as error:  # built for another torch, or another package of that name
        return f"the package flash-attn does not load ({error}): install it anew, {instead}"
    for function in (flash_attn_varlen_func, flash_attn_with_kvcache):
        if "block_table" not in inspect.signature(function).parameters:
            return f"this flash-attn knows no paged cache: pip install 'baton-serve[flash-attn]', {instead}"
    return None
