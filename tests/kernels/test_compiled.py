"""The kernels compiled for GPUs that are not there: registers, no spills, and the instructions meant."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels are Triton's; it is for Linux")

from baton_kernels import advance, sampler
from baton_kernels.decode_attention import decode_attention
from baton_kernels.decode_plan import DecodeWork, plan
from baton_kernels.invariant_linear import invariant_linear
from baton_kernels.linear import linear
from baton_kernels.narrow_linear import SHARED_BYTES as NARROW_SHARED_BYTES
from baton_kernels.narrow_linear import narrow_linear, narrow_tile
from baton_kernels.prefill_attention import PromptChunk, plan_prefill, prefill_attention
from baton_kernels.qk_rope_kv import qk_rope_kv
from baton_kernels.reference import TURNS
from baton_kernels.rms_norm import add_rms_norm
from baton_kernels.silu_mul import silu_mul
from baton_kernels.tiles import tiles
from tests.kernels.aot import compile_launches

SLOTS = 256
CPU = torch.device("cpu")
CAPABILITIES = [80, 89, 90]
REGISTERS = 1 << 16  # of a multiprocessor
SHARED_BYTES = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
ASKED_FOR = r"cp\.async\.bulk\.prefetch\.L2"
NARROW_LOAD = r"ld\.global(?![.\w:]*\.v[24])"
RESERVED_BYTES = 1 << 10  # of shared memory, per program


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def numbers(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


@dataclass(slots=True)
class Table:
    """Slot table, and the rows of a step: one bag of columns."""

    def __getattr__(self, name):
        return {
            "block_table": numbers(SLOTS, 256),
            "stop_ids": numbers(SLOTS, 16, dtype=torch.int64),
            "temperature": torch.zeros(SLOTS),
            "top_p": torch.zeros(SLOTS),
            "min_p": torch.zeros(SLOTS),
        }.get(name, numbers(SLOTS, dtype=torch.int64))


def decode(heads, kv_heads, head_dim, block_size, rows=SLOTS, pdl=False):
    cache, q = bf16(64, kv_heads, block_size, head_dim), bf16(rows, heads, head_dim)
    work = DecodeWork.make(SLOTS, heads, kv_heads, head_dim, block_size, 4096, CPU)
    table = numbers(SLOTS, 256)
    plan(work, rows, table)
    decode_attention(q, cache, cache, table, work, head_dim**-0.5, pdl=pdl)


def prefill(heads, kv_heads, head_dim, block_size):
    cache, q = bf16(64, kv_heads, block_size, head_dim), bf16(SLOTS, heads, head_dim)
    chunks = [PromptChunk(0, 0, 100, 5000)]
    work = plan_prefill(chunks, heads, kv_heads, head_dim, CPU, block_size=block_size)
    prefill_attention(q, cache, cache, numbers(SLOTS, 256), work, head_dim**-0.5, q)


def rows(turns, pdl=False):
    cache = bf16(64, 8, 16, 128)
    add_rms_norm(bf16(64, 1024), bf16(64, 1024), bf16(1024), 1e-6)
    silu_mul(bf16(64, 6144), turns=turns, rms_of=(bf16(64, 1024), 1e-6))
    places = numbers(64)
    table = torch.zeros(4096, 2, 128)
    where = table, places, places, cache, cache
    qk_rope_kv(bf16(64, 4096), bf16(128), bf16(128), 1e-6, *where, rms_of=(bf16(64, 1024), 1e-6), pdl=pdl)


def gated_linear(turns):
    x = bf16(1, 1024)
    linear(bf16(1, 6144), bf16(1024, 3072), silu=True, turns=turns, rms_of=(x, 1e-6), residual=x)


def step():
    table, vocabulary = Table(), 151936
    work = sampler.SampleWork.make(SLOTS, vocabulary, CPU)
    slots, sampled = numbers(SLOTS), numbers(SLOTS)
    allowed = numbers(4, 4748)
    sampler.sample(bf16(SLOTS, vocabulary), slots, table, work, sampled)
    sampler.sample(bf16(SLOTS, vocabulary), slots, table, work, sampled, allowed=allowed, mask_rows=slots)
    advance.begin(table, table, SLOTS, 16, numbers(SLOTS, dtype=torch.int8))
    advance.locate(table.block_table, 16, slots, slots, sampled)
    results = numbers(8, advance.HEADER + 2 * SLOTS)
    advance.advance(table, sampled, results, numbers(1, dtype=torch.int64))


def compiled(function, capability, *args, spilled_bytes=0):
    """All kernels that the function launches; none uses local memory, beyond `spilled_bytes` of registers."""
    kernels = compile_launches(lambda: function(*args), capability)
    for kernel in kernels:
        print(kernel)
        assert kernel.stack_bytes <= spilled_bytes, kernel
        assert kernel.local_bytes == 0, kernel
    return {kernel.kernel: kernel for kernel in kernels}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("turns", [0, 8])
def test_rows(turns, capability):
    kernels = compiled(rows, capability, turns)
    assert set(kernels) == {"rms_norm_kernel", "silu_mul_kernel", "qk_rope_kv_kernel"}
    for kernel in kernels.values():
        assert kernel.registers <= 64, kernel
        assert kernel.count(r"ld\.global[.\w:]*\.v[24]"), "wide loads"
    assert kernels["silu_mul_kernel"].count(NARROW_LOAD) == 0, "gates or ups one by one"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("turns", [None, 0, 8])
def test_linear(turns, capability):
    (kernel,) = (
        compiled(linear, capability, bf16(2, 1024), bf16(4096, 1024))
        if turns is None
        else compiled(gated_linear, capability, turns)
    ).values()
    assert kernel.registers <= 128, kernel
    assert kernel.count(r"ld\.global[.\w:]*\.v4"), "wide loads"
    assert kernel.count(NARROW_LOAD) <= 8, "only residuals may come one by one"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [1, 64, 256, 2048])
def test_invariant_linear(rows, capability):
    """The instruction is the same for any number of rows, or sums would not be."""
    (kernel,) = compiled(invariant_linear, capability, bf16(rows, 1024), bf16(4096, 1024)).values()
    assert kernel.registers <= 255, kernel
    assert kernel.shared_bytes + RESERVED_BYTES <= SHARED_BYTES[capability], kernel
    assert bool(kernel.count(r"wgmma\.mma_async")) == (capability == 90)
    assert bool(kernel.count(r"mma\.sync")) == (capability != 90)


@pytest.mark.parametrize("rows", [1, 64, 256, 2048])
def test_invariant_linear_before_it_waits(rows):
    """Weights are asked for, and nothing is read or written."""
    x, weight = bf16(rows, 1024), bf16(4096, 1024)
    (kernel,) = compiled(lambda: invariant_linear(x, weight, pdl=True), 90).values()
    assert kernel.count_early(ASKED_FOR) == 1
    assert kernel.count_early(r"(?:st|ld|atom)\.global|cp\.async(?!\.bulk\.prefetch)") == 0


def test_rotation_before_it_waits():
    """Only what is older than the chain is read: place, position, angles and weights."""
    kernel = compiled(rows, 90, 0, True)["qk_rope_kv_kernel"]
    assert kernel.count_early(r"ld\.global") == 8, "place, position, two halves each of angles and weights"
    assert kernel.count_early(r"(?:st|atom)\.global") == 0


@pytest.mark.parametrize("capability", [100, 120])
@pytest.mark.parametrize("rows", [8, 64, 2048])
def test_products_on_newer_cards(rows, capability):
    """Those with little shared memory have no use for our largest tiles."""
    gated: dict[str, Any] = {"turns": TURNS, "eps": 1e-6}
    for options in ({}, gated):
        product = partial(invariant_linear, bf16(rows, 1024), bf16(4096, 1024), **options)
        (kernel,) = compiled(product, capability, spilled_bytes=64).values()
        assert kernel.shared_bytes + RESERVED_BYTES <= SHARED_BYTES[capability], kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [1, 8, 64, 256, 2048])
def test_activation_in_a_product(rows, capability):
    """Gate and up of a unit meet in a thread: only what is stored passes through shared memory, as ever."""
    x, weight = bf16(rows, 1024), bf16(6144, 1024)

    def gated(**given):
        return invariant_linear(x, weight, turns=TURNS, **given)

    (kernel,) = compiled(lambda: gated(eps=1e-6), capability).values()
    assert kernel.registers <= 255, kernel
    assert kernel.shared_bytes + RESERVED_BYTES <= SHARED_BYTES[capability], kernel
    assert bool(kernel.count(r"wgmma\.mma_async")) == (capability == 90)
    (plain,) = compiled(invariant_linear, capability, x, weight).values()
    (undivided,) = compiled(gated, capability, spilled_bytes=8).values()
    assert undivided.count(r"shfl\.sync") == plain.count(r"shfl\.sync"), "between lanes"
    assert undivided.count("bar.sync") <= plain.count("bar.sync"), (undivided, plain)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("inputs", [1024, 600])
def test_the_rms_of_a_row_is_the_same_sum_among_any_number(inputs, capability):
    """Tiles share out the inputs alike. Odd inputs need many addresses, and spill: slow there, not wrong."""
    weight, ways = bf16(2048, inputs), set()
    for rows in (1, 8, 17, 64, 65, 513):
        x = bf16(rows, inputs)

        def launch(x=x):
            invariant_linear(x, weight, turns=TURNS, eps=1e-6)

        kernels = compiled(launch, capability, spilled_bytes=0 if inputs == 1024 else 600)
        ways.add(kernels["invariant_linear_kernel"].summed())
    assert len(ways) == 1, ways


@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 2048), (1024, 3072), (2048, 2048)])
def test_narrow_linear(outputs, inputs):
    """All weights are asked for before the wait, nothing else is, and they have room beside x."""
    x, weight, residual = bf16(8, inputs), bf16(outputs, inputs), bf16(8, outputs)
    options = {"residual": residual, "pdl": True}
    (kernel,) = compiled(lambda: narrow_linear(x, weight, **options), 90).values()
    tile = narrow_tile(outputs, inputs)
    assert tile is not None
    threads, vector = 32 * tile.warps, 8
    assert kernel.shared_bytes + RESERVED_BYTES <= SHARED_BYTES[90]
    assert kernel.shared_bytes <= NARROW_SHARED_BYTES
    assert kernel.registers * threads <= REGISTERS
    assert kernel.count(r"mma\.sync"), "matrix instructions"
    assert kernel.count_early(r"ld\.global[.\w:]*\.v4") == tile.outputs * inputs // (threads * vector)
    assert kernel.count_early(r"ld\.global") == kernel.count_early(r"ld\.global[.\w:]*\.v4")
    assert kernel.count_early(r"griddepcontrol\.launch_dependents") == 1
    assert kernel.ptx.index("launch_dependents") < kernel.ptx.index("ld.global"), "first of all"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [8, SLOTS])
def test_decode_attention(rows, capability):
    for shape in ((16, 8, 128, 16), (32, 8, 128, 64), (8, 8, 256, 16)):
        kernel = compiled(decode, capability, *shape, rows)["decode_attention_kernel"]
        fit = tiles(capability).decode_for(shape[3], shape[2])
        tile = next(tile for tile in fit if tile.most_rows is None or rows <= tile.most_rows)
        assert kernel.registers * 32 * tile.warps * tile.programs <= REGISTERS, (kernel, tile)
        assert (kernel.shared_bytes + RESERVED_BYTES) * tile.programs <= SHARED_BYTES[capability], (
            kernel,
            tile,
        )
        assert kernel.count(r"mma\.sync"), "matrix instructions"
        assert kernel.count(r"cp\.async\.(?:c[ag]|bulk)"), "keys and values arrive while others are in use"
        assert kernel.count(r"atom\.[\w.]*acq_rel|atom\.acq_rel"), "the last to arrive sees what others wrote"


@pytest.mark.parametrize("block_size", [16, 64])
def test_decode_attention_before_it_waits(block_size):
    """Only a few words of the step's list are read, nothing is written, and the first tile is asked for."""
    shape = (16, 8, 128, block_size, SLOTS, True)
    kernel = compiled(decode, 90, *shape)["decode_attention_kernel"]
    assert kernel.ptx.index("launch_dependents") < kernel.ptx.index("griddepcontrol.wait")
    waits = 2  # with work, and without
    assert 0 < kernel.count_early(r"ld\.global", waits) <= 10
    touched = r"(?:st|atom|red)\.|ld\.global[.\w:]*\.v[248]|cp\.async(?!\.bulk\.prefetch)"
    assert kernel.count_early(touched, waits) == 0
    assert kernel.count_early(ASKED_FOR, waits) == 2, "keys and values"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("block_size", "bulk"), [(16, False), (64, True), (128, True)])
def test_prefill_attention(block_size, bulk, capability):
    # without the bulk copy engine the fastest tile spills a little before and after its loop; with it some
    # spills are the price of a second program on the multiprocessor, and well paid
    spilled = (144 if bulk else 16) if capability == 90 else 0
    kernels = compiled(prefill, capability, 16, 8, 128, block_size, spilled_bytes=spilled)
    kernel = kernels["prefill_attention_kernel"]
    assert kernel.registers <= 255, kernel
    if capability == 90:
        if bulk:
            assert kernel.registers * 256 * 2 <= REGISTERS, "two programs at a time"
            assert (kernel.shared_bytes + RESERVED_BYTES) * 2 <= SHARED_BYTES[capability]
        assert kernel.count(r"wgmma\.mma_async"), "the matrix instructions of Hopper"
        assert not kernel.count(r"mma\.sync")
        assert bool(kernel.count(r"cp\.async\.bulk\.tensor")) == bulk
    else:
        assert kernel.count(r"mma\.sync")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_step(capability):
    kernels = compiled(step, capability)
    assert kernels["search_rows_kernel"].registers <= 128  # 512 threads
    assert kernels["score_tiles_kernel"].registers <= 128  # two programs of 256 threads at a time
    for name in ("begin_kernel", "locate_kernel", "advance_kernel"):
        assert kernels[name].registers <= 64, kernels[name]
