"""A request's prompt, in whichever form it comes, as token ids. Knows nothing of what is done with them."""

import asyncio
from array import array

import numpy as np

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.columns import TOKEN, Column
from scheduler_svc.frontend.chat import ChatTemplate, Message, TemplateFailure
from scheduler_svc.frontend.errors import Reason, RequestError, invalid
from scheduler_svc.frontend.model import Model
from scheduler_svc.frontend.validation import check_chat

_INLINE_CHARS = 10_000  # rendered by the event loop itself; a template takes microseconds a message


async def text_of(request: pb.GenerateRequest | pb.TokenizeRequest, model: Model) -> str:
    """The text of a request that has `text` or `chat`: its own, or the rendered conversation."""
    if request.WhichOneof("prompt") == "text":
        if not request.text:
            raise invalid("text", "empty")
        return request.text
    if model.chat_template is None:
        raise RequestError(Reason.NO_CHAT_TEMPLATE, "chat: this model has no chat template", field="chat")
    check_chat(request.chat)
    return await _render(model.chat_template, request.chat)


async def _render(template: ChatTemplate, chat: pb.Chat) -> str:
    messages = [Message(message.role, message.content) for message in chat.messages]
    try:
        if sum(len(message.content) for message in messages) <= _INLINE_CHARS:
            return template.render(messages)
        return await asyncio.to_thread(template.render, messages)
    except TemplateFailure as error:
        raise invalid("chat.messages", str(error)) from error


async def ids_of_text(request: pb.GenerateRequest | pb.TokenizeRequest, text: str, model: Model) -> list[int]:
    """Token ids of that text; a template has written the special tokens around it itself."""
    is_text = request.WhichOneof("prompt") == "text"
    return await model.codec.encode(text, add_special_tokens=is_text)


async def ids_of(request: pb.GenerateRequest, model: Model, *, vocab_size: int, longest: int) -> Column:
    """Token ids of the prompt, int32 [n ≥ 1], each below `vocab_size`. A prompt of ids ends at `longest`."""
    field = request.WhichOneof("prompt")
    if field is None:
        raise invalid("prompt", "one of text, token_ids and chat must be set")
    if field == "token_ids":
        return _given(request.token_ids, vocab_size, longest)
    ids = await ids_of_text(request, await text_of(request, model), model)
    if not ids:
        raise invalid(field, "has no tokens")
    prompt = np.array(ids, TOKEN)
    if int(prompt.max()) >= vocab_size:
        raise invalid(field, f"has a token beyond the model's vocabulary of {vocab_size}")
    return prompt


def _given(token_ids: pb.TokenIds, vocab_size: int, longest: int) -> Column:
    count = len(token_ids.ids)
    if not count:
        raise invalid("token_ids.ids", "empty; at least one id")
    if count >= longest:  # before time is spent on them
        message = f"token_ids.ids: {count} tokens leave no room for output, a sequence holds {longest}"
        metadata = {"prompt_tokens": str(count), "max_model_len": str(longest)}
        raise RequestError(Reason.TOO_LONG, message, field="token_ids.ids", metadata=metadata)
    ids = np.array(array("I", token_ids.ids[:]))  # numpy alone asks for each id by itself: twice the time
    wrong = ids >= vocab_size
    if wrong.any():
        place = int(wrong.argmax())
        raise invalid(f"token_ids.ids[{place}]", f"{ids[place]} is not below the vocabulary's {vocab_size}")
    return ids.astype(TOKEN)
