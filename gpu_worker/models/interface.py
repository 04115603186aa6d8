"""What the rest of the worker needs from a model of any family."""

from typing import Protocol

from torch import Tensor

from gpu_worker.attention import Context
from gpu_worker.layers.parts import Layer


class ModelConfig(Protocol):
    """Sizes that cache, rotary table and limits are made from."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...


class Model(Layer):
    """A decoder: token ids to hidden states, hidden states to logits."""

    def __call__(self, tokens: Tensor, context: Context) -> Tensor:
        """Hidden states [rows, hidden], or [picks, hidden], for token ids int64 [rows]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary]: float32, except on CUDA, where the sampler takes the model's dtype."""
        raise NotImplementedError
