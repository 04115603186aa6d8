"""The sampler against its twin, which sorts, and the noise against float64."""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from baton_kernels import reference, sampler
from baton_kernels.noise import exponential, noise_key
from baton_kernels.sampler import SampleWork, sample

STOPS = 16


@dataclass(slots=True)
class Columns:
    length: torch.Tensor
    min_length: torch.Tensor
    stop_ids: torch.Tensor
    seed: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor

    @staticmethod
    def make(slots, device):
        def full(value, *shape, dtype=torch.int64):
            return torch.full((slots, *shape), value, dtype=dtype, device=device)

        return Columns(
            length=torch.randint(0, 1 << 20, (slots,), device=device),
            min_length=full(0),
            stop_ids=full(-1, STOPS),
            seed=torch.randint(-(1 << 63), (1 << 63) - 1, (slots,), device=device),
            temperature=full(1, dtype=torch.float32),
            top_p=full(1, dtype=torch.float32),
            min_p=full(0, dtype=torch.float32),
            top_k=full(0),
        )

    def rows(self):
        columns = (self.seed, self.length, self.temperature, self.top_p, self.min_p, self.top_k)
        return reference.SamplingRows(*(column.cpu() for column in columns))


@triton.jit
def noise_kernel(seed_ptr, position_ptr, out_ptr, COUNT: tl.constexpr):
    row = tl.program_id(0)
    ids = tl.arange(0, COUNT)
    key = noise_key(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    tl.store(out_ptr + row * COUNT + ids, exponential(key, ids))


def test_noise(device, full):
    rows, count = (64, 1 << 15) if full else (3, 1 << 12)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), device=device)
    position = torch.randint(0, 1 << 31, (rows,), device=device)
    out = torch.full((rows, count), torch.nan, device=device)
    noise_kernel[(rows,)](seed, position, out, COUNT=count)
    expected = reference.exponential(seed.cpu(), position.cpu(), torch.arange(count))
    assert (out.cpu() / expected - 1).abs().max() < 4e-6


@pytest.fixture
def small_tiles(full, monkeypatch):
    if not full:
        monkeypatch.setattr(sampler, "_TILE", 64)
        monkeypatch.setattr(sampler, "_GROUP", 4)
        monkeypatch.setattr(sampler, "_NEAR_GROUPS", 16)


def scores(logits, rows):
    """float64 scores of every token, -inf for what the filters take out."""
    weights = ((logits - logits.amax(-1, keepdim=True)) / rows.temperature[:, None]).exp()
    kept = weights >= reference.sampling._floor(weights.clone(), rows)
    noise = reference.exponential(rows.seed, rows.position, torch.arange(logits.shape[1]))
    return torch.where(kept, weights.double().log() - noise.log(), -torch.inf)


def check(logits, columns, sampled, allowed_gap=1e-5):
    """The twin's tokens; another only where its score is as good as the best."""
    rows, wide = columns.rows(), logits.cpu().float()
    tokens, finite = reference.sample(wide.clone(), rows)
    expected = torch.where(finite, tokens, -1)
    actual = sampled.cpu().long()
    other = (actual != expected).nonzero().squeeze(-1)
    if len(other):
        assert finite[other].all()
        table = scores(wide[other], rows[other])
        best, got = (table.gather(1, t[other, None]).squeeze(1) for t in (expected, actual))
        assert (best - got).max() < allowed_gap, (other, best, got)
        assert len(other) <= 1 + len(actual) // 50, "ties are rare"


def columns_of_every_kind(slots, device):
    """One row of each kind of parameters, over and over."""
    columns = Columns.make(slots, device)
    kinds: list[dict[str, float]] = [
        {},
        {"temperature": 0},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"top_k": 1},
        {"top_k": 50},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"temperature": 3.0, "top_k": 1000, "top_p": 0.99, "min_p": 0.001},
        {"temperature": 1e-4},
        {"top_k": 1 << 20, "top_p": 0.9},
    ]
    for slot in range(slots):
        for name, value in kinds[slot % len(kinds)].items():
            getattr(columns, name)[slot] = value
    return columns


@pytest.mark.parametrize("shape", ["normal", "peaked", "ties"])
@pytest.mark.usefixtures("small_tiles")
def test_against_the_twin(shape, device, full):
    rows, vocabulary = (66, 151936) if full else (11, 333)
    logits = torch.randn(rows, vocabulary, device=device) * 3
    if shape == "peaked":
        logits = logits**3 / 9
    if shape == "ties":
        logits = logits.round()
    columns = columns_of_every_kind(rows, device)
    sampled = torch.full((rows,), -7, dtype=torch.int32, device=device)
    work = SampleWork.make(rows, vocabulary, device)
    sample(logits, torch.arange(rows, device=device).int(), columns, work, sampled)
    check(logits, columns, sampled)


@pytest.mark.usefixtures("small_tiles")
def test_rows_write_to_their_slots_and_broken_ones_say_so(device, full):
    vocabulary = 151936 if full else 200
    logits = torch.randn(8, vocabulary, device=device).to(torch.bfloat16)
    columns = Columns.make(20, device)
    slots = torch.tensor([3, -1, 0, 19, 7, -1, 5, 6], dtype=torch.int32, device=device)
    columns.top_k[19], columns.temperature[0] = 5, 0
    logits[2, 11] = torch.nan  # slot 0, greedy
    logits[3, 5] = torch.nan  # slot 19, with a filter
    logits[4] = -torch.inf
    logits[6, 9] = torch.inf
    sampled = torch.full((20,), -7, dtype=torch.int32, device=device)
    sample(logits, slots, columns, SampleWork.make(8, vocabulary, device), sampled)
    assert [sampled[slot].item() for slot in (0, 19, 7, 5)] == [-1] * 4
    untouched = [slot for slot in range(20) if slot not in slots.tolist()]
    assert (sampled[untouched] == -7).all()
    chosen = torch.tensor([3, 6], device=device)
    some = Columns(*(getattr(columns, name)[chosen] for name in Columns.__slots__))
    check(logits[[0, 7]], some, sampled[chosen])


@pytest.mark.usefixtures("small_tiles")
def test_stop_ids_wait_for_min_length_and_masks_hold(device, full):
    vocabulary = 151936 if full else 200
    rows = 6
    logits = torch.randn(rows, vocabulary, device=device)
    columns = Columns.make(rows, device)
    columns.temperature[:3] = 0
    columns.top_k[5] = 3
    best = logits.topk(3).indices
    columns.stop_ids[:, :2] = best[:, :2]
    columns.min_length[:] = columns.length + 1  # every row is below it …
    columns.min_length[1] = columns.length[1]  # … but this one
    words = -(-vocabulary // 32)
    allowed = torch.zeros(2, words, dtype=torch.int32, device=device)
    third = int(best[2, 2])
    allowed[1, third // 32] = 1 << third % 32 if third % 32 < 31 else -(1 << 31)
    masks = torch.tensor([-1, -1, 1, -1, 0, -1], dtype=torch.int32, device=device)
    sampled = torch.full((rows,), -7, dtype=torch.int32, device=device)
    work, slots = SampleWork.make(rows, vocabulary, device), torch.arange(rows, device=device).int()
    sample(logits, slots, columns, work, sampled, allowed=allowed, mask_rows=masks)
    masked = logits.clone()
    for row in (0, 2, 3, 4, 5):
        masked[row, best[row, :2]] = -torch.inf
    masked[2, torch.arange(vocabulary, device=device) != third] = -torch.inf
    masked[4] = -torch.inf  # nothing is allowed: not finite
    check(masked, columns, sampled)
    assert sampled[[1, 2, 4]].tolist() == [int(best[1, 0]), third, -1]
