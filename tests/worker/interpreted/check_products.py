"""Which of our products serves what, its kernel interpreted: a feed-forward and a closing projection."""

import pytest
import torch

from baton_kernels import invariant_linear, linear, narrow_linear, silu_mul
from gpu_worker.layers import ops
from gpu_worker.layers.linear import GateUp, Linear
from gpu_worker.layers.parts import walk
from gpu_worker.models.qwen3 import Qwen3Config, Qwen3MLP

HIDDEN, EPS = 48, 1e-6
KERNELS = (invariant_linear.invariant_linear, linear.linear, narrow_linear.narrow_linear, silu_mul.silu_mul)


@pytest.fixture
def called(monkeypatch):
    """Names of the kernels called, in order; layers take themselves to be on a GPU."""
    monkeypatch.setattr(ops, "on_gpu", lambda _: True)
    names = []

    def noting(kernel):
        def call(*args, **kwargs):
            activates = kwargs.get("silu") or kwargs.get("turns")
            names.append(f"{kernel.__name__} activates" if activates else kernel.__name__)
            return kernel(*args, **kwargs)

        return call

    for kernel in KERNELS:
        monkeypatch.setattr(f"{kernel.__module__}.{kernel.__name__}", noting(kernel))
    return names


def mlp(intermediate):
    """(feed-forward with random weights, brought into its layout; float64 of what x / rms(x) adds)."""
    config = Qwen3Config(
        vocab_size=1,
        hidden=HIDDEN,
        intermediate=intermediate,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        max_positions=1,
        norm_eps=EPS,
        rope_theta=1.0,
        attention_bias=False,
        tied=True,
    )
    made = Qwen3MLP(config)
    made.gate_up_proj.weight.normal_()
    made.down_proj.weight.normal_()
    gate, up = made.gate_up_proj.weight.double().split(intermediate)
    down = made.down_proj.weight.double()
    for _, part in walk(made):
        part.prepare()

    def expected(x):
        x = x.double()
        normed = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        gated = normed @ gate.T
        return x + (gated * gated.sigmoid() * (normed @ up.T)) @ down.T

    return made, expected


PRODUCT, FUSED = "invariant_linear", "invariant_linear activates"
LATER = "silu_mul activates"


@pytest.mark.parametrize(
    ("rows", "fixed", "kernels"),
    [
        (1, False, ["linear", "linear activates"]),
        (2, False, ["linear", "linear activates"]),
        (3, False, [FUSED, "narrow_linear"]),
        (16, False, [FUSED, "narrow_linear"]),
        (17, False, [FUSED, PRODUCT]),
        (128, False, [FUSED, PRODUCT]),
        (129, False, [LATER, PRODUCT]),
        (1025, False, [LATER]),
        (1, True, [FUSED, PRODUCT]),
        (65, True, [FUSED, PRODUCT]),
    ],
)
def test_feed_forward(rows, fixed, kernels, called):
    layers, expected = mlp(128)
    assert layers.gate_up_proj.turns
    if fixed:
        for _, layer in walk(layers):
            layer.fix_rows()
    x = torch.randn(rows, HIDDEN) * 3
    wanted = expected(x)
    out = layers.add(x, EPS)
    assert torch.allclose(out.double(), wanted, rtol=1e-4, atol=1e-3)
    assert called == kernels


@pytest.mark.parametrize("rows", [2, 5])
def test_units_that_cannot_take_turns(rows, called):
    layers, expected = mlp(132)
    assert not layers.gate_up_proj.turns
    x = torch.randn(rows, HIDDEN)
    wanted = expected(x)
    assert torch.allclose(layers.add(x, EPS).double(), wanted, rtol=1e-4, atol=1e-3)
    assert called == (["linear", "linear activates"] if rows == 2 else [PRODUCT, "silu_mul", PRODUCT])


@pytest.mark.parametrize("biased", [False, True])
def test_without_a_division(biased, called):
    """As where norms are not folded; a bias is none of the kernels' that have no place for it."""
    layer = GateUp(HIDDEN, 64)
    layer.weight.normal_()
    gate, up = layer.weight.double().split(64)
    layer.prepare()
    closing = Linear(128, {"o_proj": HIDDEN}, bias=biased)
    closing.weight.normal_()
    x, seen, residual = torch.randn(7, HIDDEN), torch.randn(7, 128), torch.randn(7, HIDDEN)
    gated = x.double() @ gate.T
    assert torch.allclose(
        layer.activated(x).double(), gated * gated.sigmoid() * (x.double() @ up.T), rtol=1e-4, atol=1e-3
    )
    wanted = residual.double() + seen.double() @ closing.weight.double().T
    if closing.bias is not None:
        wanted += closing.bias.normal_()
    assert torch.allclose(closing.add(seen, residual).double(), wanted, rtol=1e-4, atol=1e-3)
    assert called == [FUSED, PRODUCT if biased else "narrow_linear"]


@pytest.mark.parametrize(
    ("rows", "kernels"),
    [(1, ["linear", "linear activates"]), (9, [PRODUCT, "silu_mul", PRODUCT]), (129, ["silu_mul"])],
)
def test_large_weights_take_no_turns(rows, kernels, called, monkeypatch):
    """From some number of rows on their products are the library's."""
    monkeypatch.setattr(ops, "SMALL_WEIGHT", 100)
    layers, expected = mlp(128)
    assert not layers.gate_up_proj.turns
    x = torch.randn(rows, HIDDEN)
    wanted = expected(x)
    assert torch.allclose(layers.add(x, EPS).double(), wanted, rtol=1e-4, atol=1e-3)
    assert called == kernels
