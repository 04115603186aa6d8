"""Products of a decode step, each in the ways that we have, and the step's layers as the worker runs them."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from baton_kernels import reference
from baton_kernels.invariant_linear import invariant_linear
from baton_kernels.linear import MAX_ROWS as FEW_ROWS
from baton_kernels.linear import linear
from baton_kernels.narrow_linear import MAX_ROWS as NARROW_ROWS
from baton_kernels.narrow_linear import narrow_linear, serves
from baton_kernels.reference import TURNS
from baton_kernels.silu_mul import silu_mul
from bench.clock import DEVICE, EPS, LARGE, SMALL, Clock, Launch, Measures, bench_lengths, bf16, show
from bench.shapes import Shape
from gpu_worker import loader
from gpu_worker.attention import AttentionShape, Context
from gpu_worker.attention.triton_backend import Rows, TritonAttention
from gpu_worker.exactness import fix_rows
from gpu_worker.layers import ops
from gpu_worker.models.qwen3 import Qwen3Config, Qwen3Decoder

ROWS, QUICK_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 8, 64)
BLOCK_SIZE = 64
Way = Callable[[Tensor], Tensor]  # a product with the weight given

# How the layers are measured: as they are, and without this or that, by the worker's own thresholds.
APART: dict[str, Any] = {"NARROW_ROWS": 0, "GATED_ROWS": 0}
CHAINS: dict[str, dict[str, Any]] = {
    "ours": {},
    "not narrow": {"NARROW_ROWS": 0},
    "activation apart": {"GATED_ROWS": 0},
    "not either": APART,
    "library": APART | {"FEW_ROWS": 0, "SOME_ROWS": 0, "ADDED_ROWS": 0},
}


def _plain(x: Tensor) -> dict[str, Way]:
    """Queries, keys and values."""
    ways: dict[str, Way] = {
        "library": lambda w: library_linear(x, w),
        "matrix": lambda w: invariant_linear(x, w, pdl=True),
    }
    if len(x) <= FEW_ROWS:
        ways["rows"] = lambda w: linear(x, w, pdl=True)
    return ways


def _gated(x: Tensor) -> dict[str, Way]:
    """Gate and up with the activation; with `rows` this is in the next product, and not in the time."""
    given: dict[str, Any] = {"turns": TURNS, "pdl": True}
    ways: dict[str, Way] = {
        "library": lambda w: silu_mul(library_linear(x, w), rms_of=(x, EPS), **given),
        "matrix": lambda w: silu_mul(invariant_linear(x, w, pdl=True), rms_of=(x, EPS), **given),
        "activating": lambda w: invariant_linear(x, w, eps=EPS, **given),
    }
    if len(x) <= FEW_ROWS:
        ways["rows"] = lambda w: linear(x, w, pdl=True)
    return ways


def _added(x: Tensor, outputs: int, activates: bool) -> dict[str, Way]:
    """What closes a half of a layer, with the residual; `activates`: in `rows`, silu · up is in it."""
    residual = bf16(len(x), outputs)
    ways: dict[str, Way] = {
        "library": lambda w: torch.addmm(residual, x, w.T),
        "matrix": lambda w: invariant_linear(x, w, residual=residual, pdl=True),
    }
    if len(x) <= FEW_ROWS and activates:
        gate_up = bf16(len(x), 2 * x.shape[1])
        given: dict[str, Any] = {"silu": True, "turns": TURNS, "rms_of": (residual, EPS)}
        ways["rows"] = lambda w: linear(gate_up, w, residual=residual, pdl=True, **given)
    elif len(x) <= FEW_ROWS:
        ways["rows"] = lambda w: linear(x, w, residual=residual, pdl=True)
    if len(x) <= NARROW_ROWS and serves(bf16(outputs, x.shape[1])):
        ways["narrow"] = lambda w: narrow_linear(x, w, residual=residual, pdl=True)
    return ways


def _products(s: Shape, rows: int) -> dict[str, tuple[int, int, dict[str, Way]]]:
    """(outputs, inputs, ways) of a layer's products."""
    heads = s.heads * s.head_dim
    return {
        "qkv": (s.qkv, s.hidden, _plain(bf16(rows, s.hidden))),
        "out": (s.hidden, heads, _added(bf16(rows, heads), s.hidden, False)),
        "gate_up": (2 * s.intermediate, s.hidden, _gated(bf16(rows, s.hidden))),
        "down": (s.hidden, s.intermediate, _added(bf16(rows, s.intermediate), s.hidden, True)),
    }


def linears(clock: Clock) -> list[Measures]:
    """A layer's products, launched one after the other: by row, by matrix instructions, the library's."""
    results: list[Measures] = []
    cases = [(SMALL, rows) for rows in (QUICK_ROWS if clock.quick else (*ROWS, 1024))]
    cases += [] if clock.quick else [(LARGE, rows) for rows in (*QUICK_ROWS, 128, 256)]
    weights: dict[tuple[int, int], list[Tensor]] = {}
    for shape, rows in cases:
        for name, (outputs, inputs, ways) in _products(shape, rows).items():
            size = outputs, inputs
            if size not in weights:
                weights[size] = [
                    bf16(*size) / inputs**0.5 for _ in range(max(2, int(3e8 / outputs / inputs / 2)))
                ]
            times = {
                way: clock.graph_us([partial(product, w) for w in weights[size]], 5 if clock.quick else 12)
                for way, product in ways.items()
            }
            show(results, hidden=shape.hidden, product=name, rows=rows, us=times)
    return results


def _decoder(s: Shape) -> Qwen3Decoder:
    """The worker's layers with random weights, as they are after loading."""
    config = Qwen3Config(
        vocab_size=8,
        hidden=s.hidden,
        intermediate=s.intermediate,
        layers=s.layers,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        max_positions=4096,
        norm_eps=EPS,
        rope_theta=1e6,
        attention_bias=False,
        tied=True,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            decoder = Qwen3Decoder(config)
    finally:
        torch.set_default_dtype(usual)
    loader.fill(decoder)
    return decoder


class Step:
    """A decode step's layers over sequences of the offline bench."""

    def __init__(self, decoder: Qwen3Decoder, s: Shape, rows: int) -> None:
        self.layers, self.x = decoder.layers, bf16(rows, s.hidden)
        device = self.x.device
        lengths = torch.tensor(bench_lengths(rows), dtype=torch.int32, device=device)
        attention = TritonAttention(
            AttentionShape(s.heads, s.kv_heads, s.head_dim, BLOCK_SIZE), torch.bfloat16, device
        )
        width = -(-int(lengths.max()) // BLOCK_SIZE)
        table = torch.randperm(rows * width, device=device).to(torch.int32).view(rows, width)
        space = attention.decode_space(rows, int(lengths.max()))
        space.seen.copy_(lengths)
        space.slots.copy_(torch.arange(rows))
        last = lengths - 1
        blocks = table.gather(1, (last // BLOCK_SIZE).long()[:, None])[:, 0]
        work = Rows(
            last,
            blocks * BLOCK_SIZE + last % BLOCK_SIZE,
            table,
            decode=attention.plan_decode(space, rows, table),
        )
        rotary = reference.rotary_table(int(lengths.max()), s.head_dim, 1e6).to(device)
        self.context = Context(attention, attention.cache(s.layers, rows * width), work, rotary)

    def __call__(self) -> Tensor:
        x = self.x.clone()  # its place may be taken
        for i, layer in enumerate(self.layers):
            x = layer.folded(x, i, self.context, None)
        return x


def chain(clock: Clock) -> list[Measures]:
    """The layers of a decode step as the worker runs them, in several ways, and where rows are fixed."""
    results: list[Measures] = []
    decoder = _decoder(SMALL)
    numbers = QUICK_ROWS if clock.quick else ROWS

    def measure(ways: dict[str, dict[str, Any]]) -> None:
        for rows in numbers:
            step: Launch = Step(decoder, SMALL, rows)
            times = {}
            for way, thresholds in ways.items():
                with ExitStack() as changed:
                    for name, value in thresholds.items():
                        changed.enter_context(mock.patch.object(ops, name, value))
                    times[way] = clock.graph_us([step])
            show(results, rows=rows, us=times)

    measure(CHAINS)
    fix_rows(decoder)
    measure({"fixed rows": {}})
    return results
