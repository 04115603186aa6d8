"""The sampler's distribution against float64 softmax with filters, and its noise against an integer model."""

import math

import numpy as np
import pytest
import torch

from baton_kernels import reference

VOCABULARY = 40
DRAWS = 40_000


def rows(n: int, *, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, seed=None, position=None):
    return reference.SamplingRows(
        seed=torch.arange(n) * 7919 + 1 if seed is None else torch.full((n,), seed),
        position=torch.full((n,), 12) if position is None else position,
        temperature=torch.full((n,), temperature, dtype=torch.float32),
        top_p=torch.full((n,), top_p, dtype=torch.float32),
        min_p=torch.full((n,), min_p, dtype=torch.float32),
        top_k=torch.full((n,), top_k),
    )


def expected(logits: np.ndarray, temperature: float, top_p: float, min_p: float, top_k: int) -> np.ndarray:
    """Probabilities in float64: temperature, then top-k, top-p of what is left, min-p."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or None]
    share = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[np.concatenate(([0.0], share[:-1])) < top_p]
    kept = kept[p[kept] >= min_p * p.max()]
    result: np.ndarray = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def chi_square_limit(freedom: int) -> float:
    """Exceeded once in a million by chance (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
        {"top_k": VOCABULARY + 5, "top_p": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_draws_follow_the_filtered_softmax(filters, by):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    noise = {} if by == "seed" else {"seed": 99, "position": torch.arange(DRAWS)}
    tokens, finite = reference.sample(logits.repeat(DRAWS, 1), rows(DRAWS, **filters, **noise))
    assert finite.all()
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    settings = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0} | filters
    p = expected(logits.double().numpy(), **settings)
    assert counts[p == 0].sum() == 0
    likely = p * DRAWS >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    hoped = np.append(p[likely], p[~likely].sum()) * DRAWS
    observed, hoped = observed[hoped > 0], hoped[hoped > 0]
    if len(hoped) > 1:
        assert ((observed - hoped) ** 2 / hoped).sum() < chi_square_limit(len(hoped) - 1)


def test_rare_tokens_come_as_often_as_they_should():
    """A tail of 1,000 tokens that together have one draw in 500: noise that is cut off would lose them."""
    logits = torch.zeros(1001)
    logits[0] = math.log(1000 * 499)
    tokens, _ = reference.sample(logits.repeat(20_000, 1), rows(20_000))
    rare = int((tokens > 0).sum())
    assert abs(rare - 40) < 5 * math.sqrt(40)


def test_a_row_samples_the_same_in_any_company():
    torch.manual_seed(0)
    logits = torch.randn(16, 500)
    many = rows(16, temperature=0.9, top_p=0.9)
    mixed = reference.SamplingRows(
        many.seed,
        many.position,
        torch.tensor([0.0, 0.9] * 8),
        many.top_p,
        many.min_p,
        torch.tensor([0, 0, 3, 40] * 4),
    )
    together, _ = reference.sample(logits.clone(), mixed)
    for i in range(16):
        alone, _ = reference.sample(logits[i : i + 1].clone(), mixed[torch.tensor([i])])
        assert alone.item() == together[i]
    assert together[::2].tolist() == logits[::2].argmax(-1).tolist()


def test_a_row_without_a_finite_maximum_is_told():
    logits = torch.zeros(5, 8)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf
    logits[4, 1:] = -torch.inf
    for parameters in (None, rows(5)):
        tokens, finite = reference.sample(logits.clone(), parameters)
        assert finite.tolist() == [True, False, False, False, True]
        assert tokens[4] == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1)) * 30
    best = logits.argmax(-1)
    tokens, finite = reference.sample(logits, rows(200, temperature=temperature))
    assert finite.all()
    if temperature < 1:
        assert tokens.tolist() == best.tolist()
    else:
        assert len(tokens.unique()) > 40


def split_mix(seed: int, position: int, token: int) -> int:
    """The noise's 64 bits, in plain integers: the contract with every other implementation."""
    word = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ z >> 27) * 0x94D049BB133111EB & word
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden) & word) + (position + 1) * golden) & word)
    return mix((key + (token + 1) * golden) & word)


def test_noise_is_what_the_contract_says():
    seeds, position, ids = [0, 1, 2**63 + 5, 2**64 - 1], [0, 7, 40_000, 3], [0, 1, 151_935]
    made = reference.exponential(
        torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)), torch.tensor(position), torch.tensor(ids)
    )
    for row, seed, place in zip(made.tolist(), seeds, position, strict=True):
        for value, token in zip(row, ids, strict=True):
            fraction = ((split_mix(seed, place, token) >> 12) + 0.5) * 2.0**-52
            assert value == pytest.approx(-math.log(fraction), rel=1e-14)


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0])
@pytest.mark.parametrize(
    "filters", [{"top_p": 0.9}, {"top_p": 0.9999}, {"top_k": 1500, "top_p": 0.9}], ids=str
)
def test_filters_of_a_large_vocabulary_leave_what_they_should(spread, filters):
    """A filtered draw is the same as an unfiltered one from logits without the tokens that are out."""
    logits = torch.randn(4, 4000, generator=torch.Generator().manual_seed(5)) * spread
    settings = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0} | filters
    for row in logits:
        p = torch.from_numpy(expected(row.double().numpy(), **settings))
        left = torch.where(p > 0, row, -torch.inf)
        filtered, _ = reference.sample(row.repeat(50, 1), rows(50, **filters))
        unfiltered, _ = reference.sample(left.repeat(50, 1), rows(50))
        assert filtered.tolist() == unfiltered.tolist()
