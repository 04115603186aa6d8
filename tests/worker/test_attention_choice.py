"""Which attention backend serves, and what is said where the one that was asked for cannot."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from gpu_worker.attention import AttentionShape, Case, choose
from gpu_worker.config import parse
from gpu_worker.errors import ConfigError
from tests.support import fake_flash_attn
from tests.support.random_checkpoints import Shape, write_checkpoint

pytest.importorskip("triton", reason="kernels are Triton's; it is for Linux")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A device of capability 9.0 with every package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)


def asked(name, *, head_dim=128, block_size=256, dtype=BF16, device=CUDA, deterministic=False):
    return choose(name, Case(AttentionShape(8, 4, head_dim, block_size), dtype, device, deterministic))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_on_cpu(dtype):
    for name in ("auto", "torch"):
        assert asked(name, dtype=dtype, device=CPU).__name__ == "TorchAttention"


def test_on_cuda():
    for name in ("auto", "triton"):
        assert asked(name, block_size=16).__name__ == "TritonAttention"
    for head_dim in (8, 96, 128, 256):
        assert asked("flash_attn", head_dim=head_dim).__name__ == "FlashAttention"


REFUSED = [
    ("torch", {}, "--attention-backend torch: .* for CPU, not cuda: --attention-backend triton"),
    ("triton", {"device": CPU}, "need a CUDA device, not cpu: --attention-backend torch"),
    ("triton", {"dtype": F32}, "two bytes, not float32: --dtype bfloat16"),
    (
        "triton",
        {"head_dim": 96},
        "power of two from 16 to 256, the model's is 96: .*flash_attn, or --device cpu",
    ),
    ("auto", {"head_dim": 96}, r"--attention-backend auto \(triton\): .* is 96: "),
    ("triton", {"head_dim": 8}, "model's is 8: "),
    ("triton", {"head_dim": 512}, "model's is 512: --device cpu"),
    ("flash_attn", {"device": CPU}, "need a CUDA device, not cpu: --attention-backend torch"),
    ("flash_attn", {"dtype": F32}, "float16 and bfloat16, not float32: --dtype bfloat16"),
    ("flash_attn", {"deterministic": True}, "so --deterministic needs triton"),
    ("flash_attn", {"head_dim": 100}, "multiple of 8 up to 256, the model's is 100: "),
    ("flash_attn", {"head_dim": 264}, "the model's is 264: "),
    (
        "flash_attn",
        {"block_size": 64},
        "256 tokens, not 64: --kvcache-block-size 256, or --attention-backend triton",
    ),
]


@pytest.mark.parametrize(("name", "case", "message"), REFUSED)
def test_refused(name, case, message):
    with pytest.raises(ConfigError, match=message):
        asked(name, **case)


@pytest.mark.parametrize("name", ["auto", "triton", "flash_attn"])
def test_an_old_device(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ConfigError, match=r"capability 8\.0 or later, cuda has 7\.5: --device cpu"):
        asked(name)


@pytest.mark.parametrize("name", ["auto", "triton", "flash_attn"])
def test_no_triton(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "baton_kernels.launch", raising=False)
    with pytest.raises(ConfigError, match=r"triton does not load .*: pip install 'baton-serve\[gpu\]'"):
        asked(name)


def test_no_flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'baton-serve\[flash-attn\]', or"):
        asked("flash_attn")


def test_another_flash_attn(monkeypatch, tmp_path):
    """Of another generation, or built for another torch."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(ConfigError, match=r"does not load .*cannot import name 'flash_attn_varlen_func'"):
        asked("flash_attn")
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn.py").write_text("import flash_attn_2_cuda")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"does not load .*flash_attn_2_cuda"):
        asked("flash_attn")


def test_a_flash_attn_without_pages(monkeypatch):
    old = ModuleType("flash_attn")
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(old, name, lambda q, k, v: q)
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    with pytest.raises(ConfigError, match="knows no paged cache"):
        asked("flash_attn")


def test_flash_attn_gets_blocks_that_it_takes():
    arguments = ["--model", "m", "--device", "cpu", "--attention-backend", "flash_attn"]
    assert parse(arguments).block_size == 256
    assert parse([*arguments, "--kvcache-block-size", "64"]).block_size == 64
    assert parse(arguments[:4]).block_size == 16


def test_refused_before_weights_are_read(tmp_path):
    """There are none, and nothing is said about that."""
    folder = write_checkpoint(tmp_path / "model", Shape(), with_tokenizer=False)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    command = [sys.executable, "-m", "gpu_worker", "--model", str(folder), "--device", "cpu"]
    done = subprocess.run([*command, "--attention-backend", "flash_attn"], capture_output=True, text=True)
    assert done.returncode == 64
    assert done.stderr.splitlines()[-1].startswith("gpu_worker: --attention-backend flash_attn: its kernels")
