"""What to continue: text, token ids or chat messages, and the requests made of it.

Knows nothing about calls; whether an id exists or a role is allowed is for the server to say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.inference.v1 import inference_pb2 as pb
from baton_client.errors import InvalidArgumentError
from baton_client.sampling import Sampling


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


Messages = Sequence[ChatMessage | Mapping[str, str]]
Prompt = str | Sequence[int] | Messages


def generate_request(prompt: Prompt, sampling: Sampling) -> pb.GenerateRequest:
    """Return the request of Generate. Raises InvalidArgumentError for a prompt of the wrong form."""
    request = pb.GenerateRequest()
    fill_request(request, prompt, sampling)
    return request


def fill_request(request: pb.GenerateRequest, prompt: Prompt, sampling: Sampling) -> None:
    """Fill an empty request where it lies: a message of thousands of ids costs as much to copy as to make.

    Raises as `generate_request`.
    """
    request.sampling.CopyFrom(sampling.to_sampling())
    request.stopping.CopyFrom(sampling.to_stopping())
    if isinstance(prompt, str):
        request.text = _text("text", prompt)
    elif _is_chat(prompt):
        request.chat.CopyFrom(_chat(prompt))
    else:
        try:
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]  # checked by protobuf, far faster
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"token_ids: {error}", field="token_ids") from None


def tokenize_request(prompt: str | Messages) -> pb.TokenizeRequest:
    """Return the request of Tokenize. Raises InvalidArgumentError for a prompt of the wrong form."""
    if isinstance(prompt, str):
        return pb.TokenizeRequest(text=_text("text", prompt))
    if _is_chat(prompt):
        return pb.TokenizeRequest(chat=_chat(prompt))
    raise InvalidArgumentError("prompt: text or chat messages are expected, not token ids", field="prompt")


def _is_chat(prompt: object) -> bool:
    """Whether a prompt that is not text is a conversation. Raises for what is neither that nor token ids."""
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise InvalidArgumentError(
            f"prompt: text, token ids or chat messages are expected, not {type(prompt).__name__}",
            field="prompt",
        )
    if not prompt:
        raise InvalidArgumentError("prompt: must not be empty", field="prompt")
    return isinstance(prompt[0], ChatMessage | Mapping)


def _chat(messages: object) -> pb.Chat:
    assert isinstance(messages, Sequence)
    return pb.Chat(messages=[_message(index, message) for index, message in enumerate(messages)])


def _message(index: int, message: object) -> pb.ChatMessage:
    where = f"chat.messages[{index}]"
    if isinstance(message, ChatMessage):
        role, content = message.role, message.content
    elif isinstance(message, Mapping) and message.keys() == {"role", "content"}:
        role, content = message["role"], message["content"]
    else:
        raise InvalidArgumentError(
            f"{where}: a role and a content are expected, not {message!r}", field=where
        )
    return pb.ChatMessage(role=_text(f"{where}.role", role), content=_text(f"{where}.content", content))


def _text(field: str, value: object) -> str:
    """Return `value` if it is a text that UTF-8 can carry."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{field}: must be a text, not {value!r}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{field}: not valid Unicode at character {error.start}", field=field
        ) from None
    return value
