"""Qwen3, dense: the decoder of `Qwen3ForCausalLM`, with merged projections over a paged cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.attention import Context
from gpu_worker.fields import Fields
from gpu_worker.layers import ops
from gpu_worker.layers.embedding import Embedding
from gpu_worker.layers.linear import GateUp, Head, Linear
from gpu_worker.layers.norm import QKNormRope, RMSNorm
from gpu_worker.layers.parts import Layer
from gpu_worker.models.interface import Model


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """What config.json says, under our names. Defaults are those of the checkpoint format."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    attention_bias: bool
    tied: bool

    @staticmethod
    def read(fields: Fields) -> "Qwen3Config":
        """Raises `CheckpointError`, naming the field, for whatever this model does not do."""
        fields.refuse("quantization_config", unless=(None,))
        fields.refuse("use_sliding_window", unless=(None, False))
        fields.refuse("hidden_act", unless=(None, "silu"))
        fields.refuse_layer_types("full_attention")
        heads = fields.size("num_attention_heads")
        kv_heads = fields.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
        head_dim = fields.size("head_dim", 128)
        if head_dim % 2:
            raise fields.error("head_dim", f"{head_dim} is odd: rotary embedding needs halves")
        return Qwen3Config(
            vocab_size=fields.size("vocab_size"),
            hidden=fields.size("hidden_size"),
            intermediate=fields.size("intermediate_size"),
            layers=fields.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=fields.size("max_position_embeddings", 32768),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=fields.rope_theta(10000.0),
            attention_bias=fields.flag("attention_bias", False),
            tied=fields.flag("tie_word_embeddings", False),
        )


def _rows(x: Tensor, picked: Tensor | None) -> Tensor:
    return x if picked is None else x.index_select(0, picked)


class Qwen3Attention(Layer):
    """Grouped-query attention with norms on queries and keys."""

    def __init__(self, c: Qwen3Config) -> None:
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.qkv_proj = Linear(c.hidden, {"q_proj": q, "k_proj": kv, "v_proj": kv}, c.attention_bias)
        self.qk_norm = QKNormRope(c.heads, c.kv_heads, c.head_dim, c.norm_eps)
        self.o_proj = Linear(q, {"o_proj": c.hidden}, c.attention_bias)

    def __call__(self, x: Tensor, layer: int, context: Context, picked: Tensor | None) -> Tensor:
        seen = context.attention.forward(self.qkv_proj(x), self.qk_norm, layer, context)
        return self.o_proj(_rows(seen, picked))

    def add(self, x: Tensor, eps: float, layer: int, context: Context, picked: Tensor | None) -> Tensor:
        """x + attention of x / rms(x), which may take the place of x."""
        seen = context.attention.forward(self.qkv_proj(x), self.qk_norm, layer, context, (x, eps))
        return self.o_proj.add(_rows(seen, picked), _rows(x, picked))


class Qwen3MLP(Layer):
    """Gated feed-forward."""

    def __init__(self, c: Qwen3Config) -> None:
        self.gate_up_proj = GateUp(c.hidden, c.intermediate)
        self.down_proj = Linear(c.intermediate, {"down_proj": c.hidden})

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj.activated(x))

    def add(self, x: Tensor, eps: float) -> Tensor:
        """x + feed-forward of x / rms(x), which may take the place of x."""
        return self.down_proj.add_gated(self.gate_up_proj, x, eps)


class Qwen3Layer(Layer):
    """Attention, then feed-forward, each after a norm and added to the residual."""

    def __init__(self, c: Qwen3Config) -> None:
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.self_attn = Qwen3Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.mlp = Qwen3MLP(c)

    def __call__(
        self, x: Tensor, residual: Tensor | None, layer: int, context: Context, picked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what to add, the sum), of `picked` rows alone where these are named."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, layer, context, picked)
        x, residual = self.post_attention_layernorm(x, _rows(residual, picked))
        return self.mlp(x), residual

    def fold(self) -> None:
        """The weights of both norms go into the products that follow."""
        self.input_layernorm.fold(self.self_attn.qkv_proj)
        self.post_attention_layernorm.fold(self.mlp.gate_up_proj)

    def folded(self, x: Tensor, layer: int, context: Context, picked: Tensor | None) -> Tensor:
        """The same after `fold`, on the sum x, whose place the new one may take.

        Products are of x itself: what comes of them is divided by rms(x) by whoever reads it, so norms and
        additions need no kernels of their own.
        """
        x = self.self_attn.add(x, self.input_layernorm.eps, layer, context, picked)
        return self.mlp.add(x, self.post_attention_layernorm.eps)


class Qwen3Decoder(Layer):
    """Embedding, layers, last norm."""

    def __init__(self, c: Qwen3Config) -> None:
        self.embed_tokens = Embedding(c.vocab_size, c.hidden)
        self.layers = [Qwen3Layer(c) for _ in range(c.layers)]
        self.norm = RMSNorm(c.hidden, c.norm_eps)
        self.is_biased = c.attention_bias
        self.is_folded = False

    def prepare(self) -> None:
        # not the last norm: the head's weight may be another's too
        if self.folds():
            for layer in self.layers:
                layer.fold()
            self.is_folded = True

    def folds(self) -> bool:
        """Whether norms go into the products that follow: on CUDA, where a kernel less is time less.

        float16 ends at 65,504, and products of sums that no norm has made small could leave it; a bias is not
        to be divided.
        """
        weight = self.norm.weight
        return ops.on_gpu(weight) and weight.dtype != torch.float16 and not self.is_biased

    def __call__(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.embed_tokens(tokens)
        residual: Tensor | None = None
        for i, layer in enumerate(self.layers):
            # the last layer writes keys and values of all rows, and has only to finish those asked for
            picked = context.picked if i == len(self.layers) - 1 else None
            if self.is_folded:
                x = layer.folded(x, i, context, picked)
            else:
                x, residual = layer(x, residual, i, context, picked)
        x, _ = self.norm(x, residual)
        return x


class Qwen3(Model):
    """The decoder and its head."""

    def __init__(self, config: Qwen3Config) -> None:
        self.model = Qwen3Decoder(config)
        tied = self.model.embed_tokens.weight if config.tied else None
        self.lm_head = Head(config.hidden, config.vocab_size, tied)

    def __call__(self, tokens: Tensor, context: Context) -> Tensor:
        """Hidden states [rows, hidden], or [picks, hidden], for token ids int64 [rows]."""
        return self.model(tokens, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary]: float32, except on CUDA, where the sampler takes the model's dtype."""
        logits = self.lm_head(hidden)
        return logits if logits.is_cuda else logits.float()
