"""Requests of mixed lengths that arrive one after another, and what serving them all took.

Knows nothing about who serves them.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, the number of tokens to generate, and when it arrives after the start."""

    token_ids: list[int]
    max_tokens: int
    arrival_s: float
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from the first arrival to the last token, and the tokens of every request."""

    elapsed_s: float
    outputs: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time."""
        return sum(map(len, self.outputs)) / self.elapsed_s


def single(seed: int, vocab_size: int, prompt_tokens: int, max_tokens: int) -> list[Request]:
    """Return one request."""
    return [Request(_prompt(random.Random(seed), vocab_size, prompt_tokens), max_tokens, 0.0)]


def staggered(
    seed: int,
    vocab_size: int,
    requests: int,
    prompt_tokens: tuple[int, int],
    max_tokens: tuple[int, int],
    every_s: float,
) -> list[Request]:
    """Return requests that arrive `every_s`; lengths are drawn once for all seeds, prompts anew for each."""
    rng, lengths = random.Random(seed), random.Random(0)
    sizes = [(lengths.randint(*prompt_tokens), lengths.randint(*max_tokens)) for _ in range(requests)]
    return [
        Request(_prompt(rng, vocab_size, prompt), output, index * every_s)
        for index, (prompt, output) in enumerate(sizes)
    ]


def _prompt(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    """Return random ids of ordinary tokens: special ones sit at the end of a vocabulary."""
    return [rng.randrange(2, vocab_size - 64) for _ in range(length)]
