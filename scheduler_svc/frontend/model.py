"""The served model as the front-end knows it: texts, templates, defaults. Limits are the workers' to tell."""

from dataclasses import dataclass

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.frontend import Service
from scheduler_svc.checkpoint import Checkpoint
from scheduler_svc.frontend import chat, tokenizer
from scheduler_svc.frontend.chat import ChatTemplate
from scheduler_svc.frontend.tokenizer import TextCodec


@dataclass(frozen=True, slots=True)
class Model:
    """Everything about the model that does not depend on workers. `eos_token_ids` is sorted."""

    checkpoint: Checkpoint
    codec: TextCodec
    chat_template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    default_max_tokens: int


def load(checkpoint: Checkpoint, default_max_tokens: int) -> Model:
    """Reads tokenizer and chat template. Raises `CheckpointError` that names the file."""
    codec = tokenizer.load(checkpoint)
    eos = set(checkpoint.eos_token_ids)
    named = chat.special_tokens(checkpoint.tokenizer_config).get("eos_token")
    if named is not None and (token_id := codec.token_id(named)) is not None:
        eos.add(token_id)
    return Model(
        checkpoint=checkpoint,
        codec=codec,
        chat_template=chat.load(checkpoint.path, checkpoint.tokenizer_config),
        eos_token_ids=tuple(sorted(eos)),
        default_max_tokens=default_max_tokens,
    )


def longest_sequence(service: Service) -> int:
    """Tokens, prompt and output together, that every ready group can hold."""
    return min(service.max_model_len, service.max_sequence)


def describe(model: Model, service: Service | None) -> pb.GetModelResponse:
    """The answer to GetModel; limits are 0 until a worker group has been ready."""
    service = service or Service(ready_groups=0)
    defaults = model.checkpoint.sampling
    return pb.GetModelResponse(
        name=model.checkpoint.name,
        fingerprint=model.checkpoint.fingerprint,
        max_model_len=longest_sequence(service),
        vocab_size=service.vocab_size,
        eos_token_ids=model.eos_token_ids,
        default_sampling=pb.Sampling(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
        ),
        default_max_tokens=model.default_max_tokens,
        supports_chat=model.chat_template is not None,
        ready_groups=service.ready_groups,
        block_size=service.block_size,
    )
