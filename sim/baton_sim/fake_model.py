"""A model without weights: the next token is a hash of everything before it.

A *chain* summarises tokens 0 … p: it starts at 0 and grows by `chain · M + token + 1` modulo 2^64. The token
at position q is a hash of (seed, q, chain of 0 … q-1), so one wrong token, position or block anywhere in a
sequence's past changes all that follows. `expected_tokens` computes a request's stream from the request
alone, in plain integers; `SlotTable` computes the same from KV blocks, in vectors.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton_wire.columns import Column
from baton_wire.result import NO_TOKEN, End

Chains = NDArray[np.uint64]

_BITS = (1 << 64) - 1
_M = 0x9E3779B97F4A7C15
_M_INVERSE = pow(_M, -1, 1 << 64)
_SEED, _POSITION = 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What the hash is turned into: `stop_id` once in `stop_every` tokens or so, a numerical end once in
    `numerical_every` (0: never), else any token below `vocab_size`."""

    vocab_size: int = 1000
    stop_id: int | None = None
    stop_every: int = 64
    numerical_every: int = 0

    def sample(self, seeds: Column, positions: Column, chains: Chains) -> Column:
        """int32 [n]: the token at each position, `NO_TOKEN` for a numerical end. Shapes [n]."""
        word: Chains = chains + seeds * np.uint64(_SEED) + positions.astype(np.uint64) * np.uint64(_POSITION)
        word ^= word >> np.uint64(30)
        word *= np.uint64(_MIX_1)
        word ^= word >> np.uint64(27)
        word *= np.uint64(_MIX_2)
        word ^= word >> np.uint64(31)
        tokens = (word % np.uint64(self.vocab_size)).astype(np.int32)
        if self.stop_id is not None:
            tokens[(word >> np.uint64(32)) % np.uint64(self.stop_every) == 0] = self.stop_id
        if self.numerical_every:
            tokens[(word >> np.uint64(48)) % np.uint64(self.numerical_every) == 1] = NO_TOKEN
        return tokens

    def sample_one(self, seed: int, position: int, chain: int) -> int:
        """The same for one position, in plain integers."""
        word = (chain + seed * _SEED + position * _POSITION) & _BITS
        word = (word ^ word >> 30) * _MIX_1 & _BITS
        word = (word ^ word >> 27) * _MIX_2 & _BITS
        word ^= word >> 31
        if self.numerical_every and (word >> 48) % self.numerical_every == 1:
            return NO_TOKEN
        if self.stop_id is not None and (word >> 32) % self.stop_every == 0:
            return self.stop_id
        return word % self.vocab_size

    def allowed(self, token: int, banned: tuple[int, ...]) -> int:
        """The first token from `token` on, cyclically, that is not banned."""
        while token in banned:
            token = (token + 1) % self.vocab_size
        return token


class Chain:
    """Chains of runs of tokens, with the powers of M that they need."""

    def __init__(self) -> None:
        self._up = np.ones(1, np.uint64)  # M^i
        self._down = np.ones(1, np.uint64)  # M^-i

    def extend(self, chain: int, tokens: Column) -> Chains:
        """uint64 [n]: the chain after each of `tokens`, which follow what `chain` stands for."""
        n = len(tokens)
        if n >= len(self._up):
            self._up, self._down = _powers(_M, 2 * n), _powers(_M_INVERSE, 2 * n)
        terms = (tokens.astype(np.uint64) + np.uint64(1)) * self._down[1 : n + 1]
        sums: Chains = np.cumsum(terms, dtype=np.uint64)
        return (sums + np.uint64(chain)) * self._up[1 : n + 1]


def extend_each(chains: Chains, tokens: Column) -> Chains:
    """One more token on each chain; shapes [n]."""
    grown: Chains = chains * np.uint64(_M) + tokens.astype(np.uint64) + np.uint64(1)
    return grown


def _powers(base: int, count: int) -> Chains:
    factors = np.full(count + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Expected:
    """The whole stream of a request and why it ends."""

    tokens: list[int]
    end: End


def expected_tokens(
    prompt: Any,
    sampling: Any,
    max_tokens: int,
    *,
    min_tokens: int = 0,
    stop_ids: tuple[int, ...] = (),
    model: FakeModel | None = None,
) -> Expected:
    """What a fake worker generates for a request, whatever else it computes beside it.

    `prompt`: token ids; `sampling`: record of `SAMPLING`, or anything with `["seed"]`, the only field that
    matters here. The stop id that ends a stream is its last token; a numerical end adds none.
    """
    model = model or FakeModel()
    seed, chain, tokens = int(sampling["seed"]), 0, list[int]()
    for token in prompt:
        chain = (chain * _M + int(token) + 1) & _BITS
    for i in range(max_tokens):
        token = model.sample_one(seed, len(prompt) + i, chain)
        if token == NO_TOKEN:
            return Expected(tokens, End.NUMERICAL)
        if i < min_tokens:
            token = model.allowed(token, stop_ids)
        tokens.append(token)
        if token in stop_ids:
            return Expected(tokens, End.STOP)
        chain = (chain * _M + token + 1) & _BITS
    return Expected(tokens, End.LENGTH)
