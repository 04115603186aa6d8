"""What the server answers, as plain frozen values, and how each is read from its message.

Knows nothing about calls or errors.
"""

from dataclasses import dataclass
from enum import Enum

from baton.inference.v1 import inference_pb2 as pb


class FinishReason(Enum):
    """Why generation ended."""

    STOP = "stop"
    """A stop token or stop string was generated."""
    LENGTH = "length"
    """`max_tokens` or the model's context was reached."""
    UNKNOWN = "unknown"
    """A reason that this version of the client does not know."""


class HealthStatus(Enum):
    """Whether the service takes requests; the values are those of grpc.health.v1."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request: of its prompt, of these taken from the prefix cache, and generated."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More tokens: the text that they completed (never a broken character), and the position of the first."""

    text: str
    token_ids: tuple[int, ...]
    index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a stream; `matched_stop` is the stop string that ended it, if one did."""

    reason: FinishReason
    usage: Usage
    matched_stop: str | None


Event = Delta | Finish


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `token_ids` include the stop token; `text` omits special tokens and the stop string."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text, and that text: the rendered conversation where messages were given."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """Sampling that the server uses where a request leaves a field unset."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class Model:
    """The served model and its limits; lengths in tokens."""

    name: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: DefaultSampling
    default_max_tokens: int
    supports_chat: bool
    ready_groups: int
    block_size: int


_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def delta_of(delta: pb.Delta) -> Delta:
    """Read more tokens."""
    return Delta(delta.text, tuple(delta.token_ids), delta.index)


def finish_of(finish: pb.Finish) -> Finish:
    """Read the end of a generation."""
    usage = Usage(finish.usage.prompt_tokens, finish.usage.cached_tokens, finish.usage.completion_tokens)
    return Finish(_REASONS.get(finish.reason, FinishReason.UNKNOWN), usage, finish.matched_stop or None)


def event_of(response: pb.GenerateResponse) -> Event | None:
    """Read one message of a stream; None for a kind of event that this version does not know."""
    match response.WhichOneof("event"):
        case "delta":
            return delta_of(response.delta)
        case "finish":
            return finish_of(response.finish)
    return None


def tokens_of(response: pb.TokenizeResponse) -> Tokens:
    """Read the answer of Tokenize."""
    return Tokens(tuple(response.token_ids), response.text)


def model_of(response: pb.GetModelResponse) -> Model:
    """Read the answer of GetModel."""
    default = response.default_sampling
    return Model(
        name=response.name,
        fingerprint=response.fingerprint,
        max_model_len=response.max_model_len,
        vocab_size=response.vocab_size,
        eos_token_ids=tuple(response.eos_token_ids),
        default_sampling=DefaultSampling(
            default.temperature,
            default.top_k,
            default.top_p if default.HasField("top_p") else 1.0,
            default.min_p,
        ),
        default_max_tokens=response.default_max_tokens,
        supports_chat=response.supports_chat,
        ready_groups=response.ready_groups,
        block_size=response.block_size,
    )
