"""The sampler: filters, and Gumbel-max with noise that depends on nothing but (seed, position, token id).

Noise is SplitMix64 (Steele, Lea, Flood 2014): a key is mixed from seed and position, and the token id counts.
The integers are the contract with other implementations; float64 after that, so that neither tail is cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The 64-bit word as torch's int64."""
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_MANTISSA_BITS = 52
_TILE = 1 << 18  # probabilities sampled at a time on CPU: all that is made of them should stay in cache
_NUCLEUS = 1024


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of the rows to sample, [n] each: `plan.SAMPLING`, and the position of the token to come."""

    seed: Tensor  # int64, the bits of the unsigned seed
    position: Tensor  # int64
    temperature: Tensor  # float32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    top_k: Tensor  # int64

    def __getitem__(self, rows: Tensor) -> "SamplingRows":
        """The parameters of some of the rows."""
        columns = (self.seed, self.position, self.temperature, self.top_p, self.min_p, self.top_k)
        return SamplingRows(*(column.index_select(0, rows) for column in columns))


def sample(logits: Tensor, rows: SamplingRows | None) -> tuple[Tensor, Tensor]:
    """(token ids int64 [n], has the row a finite maximum bool [n]) for float32 logits [n, vocabulary].

    Tokens that may not be sampled have the logit -inf. A row without a finite maximum gets some id. No
    `rows`: all are greedy, the first of the largest logits wins. `logits` is consumed.
    """
    maximum = logits.amax(-1, keepdim=True)
    finite = maximum.squeeze(-1).isfinite()
    tokens = logits.argmax(-1)
    if rows is not None:
        random = ((rows.temperature > 0) & finite).nonzero().squeeze(-1)
        for some in random.split(max(1, _TILE // logits.shape[1])):
            tokens[some] = _sample_random(logits[some], maximum[some], rows[some])
    return tokens, finite


def _sample_random(logits: Tensor, maximum: Tensor, rows: SamplingRows) -> Tensor:
    """Token ids of rows with a temperature: the largest of probability / exponential noise wins."""
    weights = logits.sub_(maximum).div_(rows.temperature[:, None]).exp_()  # the largest is 1
    weights = torch.where(weights >= _floor(weights, rows), weights, 0).double()
    ids = torch.arange(weights.shape[-1], device=weights.device)
    return weights.div_(exponential(rows.seed, rows.position, ids)).argmax(-1)


def _floor(weights: Tensor, rows: SamplingRows) -> Tensor:
    """Weights below this [n, 1] are out: the highest of the floors of top-k, top-p of what is left, min-p.

    Tokens as likely as the last one that is in are in too.
    """
    floor = rows.min_p[:, None].clone()
    limited = (rows.top_k > 0) & (rows.top_k < weights.shape[-1])
    for of, some in (
        (_limited_floor, limited.nonzero().squeeze(-1)),
        (_unlimited_floor, (~limited & (rows.top_p < 1)).nonzero().squeeze(-1)),
    ):
        if len(some):
            floor[some] = torch.maximum(floor[some], of(weights[some], rows[some]))
    return floor


def _limited_floor(weights: Tensor, rows: SamplingRows) -> Tensor:
    """Top-k, and top-p of those k."""
    k, top_p = rows.top_k[:, None], rows.top_p[:, None]
    best = weights.topk(int(k.max())).values
    best = torch.where(torch.arange(best.shape[-1], device=best.device) < k, best, 0).double()
    reached = best.cumsum(-1)
    inside = (reached - best < top_p.double() * reached[:, -1:]) | (top_p >= 1)
    last = (inside & (best > 0)).sum(-1, keepdim=True).sub_(1)
    return best.gather(-1, last).float()


def _unlimited_floor(weights: Tensor, rows: SamplingRows) -> Tensor:
    """Top-p of the whole vocabulary: nearly always of a few tokens, so that no sort of all is needed."""
    share = rows.top_p[:, None].double() * weights.double().cumsum(-1)[:, -1:]
    for count in (min(_NUCLEUS, weights.shape[-1]), weights.shape[-1]):
        best = weights.topk(count).values
        before = best.double().cumsum(-1) - best.double()
        inside = (before < share).sum(-1, keepdim=True)
        if int(inside.max()) < count:
            break
    return best.gather(-1, inside.sub_(1))


def exponential(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Exponentially distributed float64 [n, ids]; seed, position: int64 [n]; ids: int64 [ids].

    From 52 bits, so between 1e-16 and 36.7: Gumbel noise, its negative logarithm, reaches 36.7 as well.
    """
    key = _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)
    bits = _mix(key[:, None] + (ids + 1) * _GOLDEN)
    fraction = _shift(bits, 64 - _MANTISSA_BITS).double().add_(0.5).mul_(2.0**-_MANTISSA_BITS)
    return fraction.log_().neg_()


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finaliser; consumes `word`."""
    word = word.bitwise_xor_(_shift(word, 30)).mul_(_MIX_1)
    word = word.bitwise_xor_(_shift(word, 27)).mul_(_MIX_2)
    return word.bitwise_xor_(_shift(word, 31))


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of the 64-bit words in int64."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)
