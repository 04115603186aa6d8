"""Text becomes token ids. Long texts are tokenized beside the event loop, so that no stream waits for them.

The `tokenizers` library only: transformers would load torch.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from tokenizers import AddedToken, Tokenizer

from scheduler_svc.checkpoint import Checkpoint, CheckpointError
from scheduler_svc.frontend.chat import special_tokens
from scheduler_svc.frontend.detokenizer import Detokenization

_INLINE_CHARS = 1_000  # about half a millisecond
_THREADS = 2
logger = logging.getLogger(__name__)


class TextCodec:
    """Encodes text and makes detokenizers, for one checkpoint."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.detokenization = Detokenization(tokenizer)
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenizer")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, in which special tokens are recognised; with those that the model adds around it."""
        if len(text) <= _INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch, since only that lets go of the interpreter's lock for the whole time.
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def token_id(self, token: str) -> int | None:
        """The id of a token by its content."""
        return self._tokenizer.token_to_id(token)


def load(checkpoint: Checkpoint) -> TextCodec:
    """The tokenizer of the checkpoint. Raises `CheckpointError`."""
    file = checkpoint.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # what the library raises
        raise CheckpointError(f"{file}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _mark_special(tokenizer, checkpoint)
    return TextCodec(tokenizer)


def _mark_special(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Tokens that tokenizer_config.json names, as the end of sequence, are special, as in transformers."""
    for name, token in special_tokens(checkpoint.tokenizer_config).items():
        if tokenizer.token_to_id(token) is not None:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        else:
            logger.warning("%s %r is not in the vocabulary", name, token)
