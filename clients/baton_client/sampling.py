"""How tokens are chosen and when generation ends: `Sampling`, and `SamplingParams` with nano-vLLM's defaults.

Checked when made, with the API's own limits, so that a mistake is named before anything is sent. Knows
nothing about calls.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from baton.inference.v1 import inference_pb2 as pb
from baton_client.errors import InvalidArgumentError

_MAX_STOPS = 16
_MAX_STOP_CHARS = 256
_UINT32 = 2**32 - 1
_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens and when to end. None leaves the choice to the checkpoint or the server.

    temperature: 0 (the most likely token) to 100. top_k: keep that many tokens, 0 keeps all. top_p: in (0,
    1]. min_p: in [0, 1]. seed: equal seed, prompt and parameters give equal tokens. max_tokens: at least 1.
    min_tokens: no end before that many. stop_token_ids: at most 16. stop: at most 16 texts of 1 to 256
    characters, or one text. Raises InvalidArgumentError (a ValueError) naming the field.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_integer("max_tokens", self.max_tokens, 1, _UINT32)
        _check_integer("min_tokens", self.min_tokens, 0, _UINT32)
        _check_integer("top_k", self.top_k, 0, _UINT32)
        _check_integer("seed", self.seed, 0, _UINT64)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}")
        _check_stops(stop, self.stop_token_ids)

    def to_sampling(self) -> pb.Sampling:
        """Return the API's Sampling; None stays unset."""
        return pb.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )

    def to_stopping(self) -> pb.Stopping:
        """Return the API's Stopping; None stays unset."""
        return pb.Stopping(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True, slots=True)
class SamplingParams(Sampling):
    """`Sampling` with nano-vLLM's names, order and defaults: temperature 1, 64 tokens, no filter.

    Besides nano-vLLM's three: temperature 0 is allowed and greedy; top_k, top_p, min_p, seed, stop,
    stop_token_ids and min_tokens. None, where a field allows it, leaves the choice to the checkpoint.
    """

    temperature: float | None = 1.0
    max_tokens: int | None = 64
    top_k: int | None = 0
    top_p: float | None = 1.0
    min_p: float | None = 0.0


def _invalid(field: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {problem}", field=field)


def _check_number(field: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Check that `value` is None or a number in [low, high], or in (low, high] if `above`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(field, f"must be a number, not {value!r}")
    if math.isnan(value) or not low <= value <= high or (above and value == low):
        raise _invalid(field, f"must be {'above' if above else 'from'} {low:g} to {high:g}, not {value:g}")


def _check_integer(field: str, value: object, low: int, high: int) -> None:
    """Check that `value` is None or an integer in [low, high]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(field, f"must be an integer, not {value!r}")
    if not low <= value <= high:
        raise _invalid(field, f"must be from {low} to {high}, not {value}")


def _check_stops(stop: Iterable[str], stop_token_ids: Iterable[int]) -> None:
    """Check both kinds of stops: how many, and each of them."""
    texts, ids = tuple(stop), tuple(stop_token_ids)
    if len(texts) > _MAX_STOPS:
        raise _invalid("stop", f"at most {_MAX_STOPS} are allowed, not {len(texts)}")
    if len(ids) > _MAX_STOPS:
        raise _invalid("stop_token_ids", f"at most {_MAX_STOPS} are allowed, not {len(ids)}")
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= _MAX_STOP_CHARS:
            raise _invalid("stop", f"each must be a text of 1 to {_MAX_STOP_CHARS} characters, not {text!r}")
    for token_id in ids:
        _check_integer("stop_token_ids", token_id, 0, _UINT32)
