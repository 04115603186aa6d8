"""Typed clients of the public API (`Client`, `AsyncClient`), the `baton` command and the offline `LLM` face.

Needs grpcio and protobuf only; the extra `client` adds the progress bars and live panels. Never imports the
scheduler or a worker: it starts them as processes of their own (`stack.py`).
"""

from baton_client.aio import AsyncClient, AsyncStream
from baton_client.client import Client, Stream
from baton_client.errors import (
    BatonError,
    CallCancelledError,
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
from baton_client.llm import LLM
from baton_client.mux import AsyncMux, Mux
from baton_client.prompt import ChatMessage, Messages, Prompt
from baton_client.results import (
    Completion,
    DefaultSampling,
    Delta,
    Event,
    Finish,
    FinishReason,
    HealthStatus,
    Model,
    Tokens,
    Usage,
)
from baton_client.sampling import Sampling, SamplingParams
from baton_client.stack import Stack, StackError, StackOptions

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncMux",
    "AsyncStream",
    "BatonError",
    "CallCancelledError",
    "ChatMessage",
    "Client",
    "Completion",
    "DeadlineError",
    "DefaultSampling",
    "Delta",
    "Event",
    "ExhaustedError",
    "Finish",
    "FinishReason",
    "HealthStatus",
    "InternalError",
    "InvalidArgumentError",
    "Messages",
    "Model",
    "Mux",
    "Prompt",
    "Sampling",
    "SamplingParams",
    "Stack",
    "StackError",
    "StackOptions",
    "Stream",
    "Tokens",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
