"""Payloads of the handshake: who dials in, and what it is told. JSON, since they are rare and grow."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from baton_wire.errors import WireError


class JsonRecord:
    """Encoding shared by dataclasses of plain fields."""

    __slots__ = ()

    def encode(self) -> bytes:
        """The payload."""
        return json.dumps(asdict(self)).encode()  # type: ignore[call-overload]

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """The record in `payload`; `WireError` where a field is missing, unknown, or of another type."""
        return cls._of_json(payload)

    @classmethod
    def _of_json(cls, text: bytes | memoryview) -> Self:
        try:
            fields: dict[str, Any] = json.loads(bytes(text))
            record = cls(**fields)
        except (ValueError, TypeError, RecursionError) as error:
            raise WireError(f"{cls.__name__}: {error}") from None
        for name, kind in cls.__annotations__.items():
            if type(getattr(record, name)) is not kind:
                raise WireError(f"{cls.__name__}.{name}: {getattr(record, name)!r} is no {kind.__name__}")
        return record


@dataclass(frozen=True, slots=True)
class WorkerHello(JsonRecord):
    """One rank of a worker group offers itself. The worker owns the limits: the core obeys them.

    `fingerprint`: of the checkpoint's configuration, tokenizer and weight index; must equal the scheduler's.
    `max_tokens_per_step`: rows of one forward pass, decodes and prefill tokens together, ≥ max_slots.
    `row_multiple`: forward rows are padded to a multiple of this.
    """

    group: str
    rank: int
    ranks: int
    fingerprint: str
    block_size: int
    num_blocks: int
    max_slots: int
    max_model_len: int
    max_tokens_per_step: int
    vocab_size: int
    row_multiple: int


def longest_sequence(max_model_len: int, num_blocks: int, block_size: int) -> int:
    """Tokens, prompt and output, of the longest sequence that a worker of these limits can hold.

    The last token's keys and values are never needed, so it may lie one beyond the cache.
    """
    return min(max_model_len, num_blocks * block_size + 1)


@dataclass(frozen=True, slots=True)
class FrontendHello(JsonRecord):
    """A front-end offers itself."""

    name: str


@dataclass(frozen=True, slots=True)
class Refusal(JsonRecord):
    """The core does not take the peer, and asking again will not help. `reason` is a word in CAPITALS."""

    reason: str
    message: str
