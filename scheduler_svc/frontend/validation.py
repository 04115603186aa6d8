"""Every field of a request against its documented range. Raises `RequestError` that names the field."""

import math

from baton.inference.v1 import inference_pb2 as pb
from scheduler_svc.frontend.errors import Reason, RequestError, invalid

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_CHARS = 256


def check_sampling(sampling: pb.Sampling) -> None:
    """Refuses what is not a number in range."""
    _check_range("sampling.temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    _check_range("sampling.min_p", sampling.min_p, 0.0, 1.0)
    if sampling.HasField("top_p"):
        _check_range("sampling.top_p", sampling.top_p, 0.0, 1.0)
        if sampling.top_p == 0.0:
            raise invalid("sampling.top_p", "0 keeps no token; 1 keeps all")


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise invalid(field, f"{value:g} is not in [{low:g}, {high:g}]")


def check_stopping(stopping: pb.Stopping) -> None:
    """Refuses what holds whatever the model."""
    if stopping.HasField("max_tokens"):
        if stopping.max_tokens == 0:
            raise invalid("stopping.max_tokens", "0 asks for nothing; at least 1")
        if stopping.min_tokens > stopping.max_tokens:
            raise invalid(
                "stopping.min_tokens", f"{stopping.min_tokens} is above max_tokens {stopping.max_tokens}"
            )
    if len(stopping.stop) > MAX_STOPS:
        raise invalid("stopping.stop", f"{len(stopping.stop)} stop strings, at most {MAX_STOPS} are possible")
    for place, stop in enumerate(stopping.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise invalid(f"stopping.stop[{place}]", f"{len(stop)} characters, not 1 to {MAX_STOP_CHARS}")


def check_stop_ids(stopping: pb.Stopping, vocab_size: int) -> None:
    """Refuses ids that the model does not have."""
    for place, token_id in enumerate(stopping.stop_token_ids):
        if token_id >= vocab_size:
            raise invalid(
                f"stopping.stop_token_ids[{place}]", f"{token_id} is not below the vocabulary's {vocab_size}"
            )


def check_chat(chat: pb.Chat) -> None:
    """Refuses an empty conversation and unknown roles."""
    if not chat.messages:
        raise invalid("chat.messages", "empty; at least one message")
    for place, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise invalid(
                f"chat.messages[{place}].role", f"{message.role[:32]!r} is none of {', '.join(ROLES)}"
            )


def output_budget(
    stopping: pb.Stopping, *, prompt_field: str, prompt_tokens: int, longest: int, default_max_tokens: int
) -> int:
    """How many tokens may be generated after the prompt. `longest`: sequence, in tokens."""
    room = longest - prompt_tokens
    if room < 1:
        message = f"{prompt_tokens} tokens leave no room for output, a sequence holds at most {longest}"
        raise _too_long(prompt_field, message, prompt_tokens, longest)
    if not stopping.HasField("max_tokens"):
        if stopping.min_tokens > room:
            message = f"{stopping.min_tokens} after a prompt of {prompt_tokens}, a sequence holds {longest}"
            raise _too_long("stopping.min_tokens", message, prompt_tokens, longest)
        return min(room, max(default_max_tokens, stopping.min_tokens))
    if stopping.max_tokens > room:
        message = f"{stopping.max_tokens} after a prompt of {prompt_tokens}, a sequence holds {longest}"
        raise _too_long("stopping.max_tokens", message, prompt_tokens, longest)
    return stopping.max_tokens


def _too_long(field: str, message: str, prompt_tokens: int, longest: int) -> RequestError:
    metadata = {"prompt_tokens": str(prompt_tokens), "max_model_len": str(longest)}
    return RequestError(Reason.TOO_LONG, f"{field}: {message}", field=field, metadata=metadata)
