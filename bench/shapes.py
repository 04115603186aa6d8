"""Shapes of Qwen3 checkpoints, as folders without weights, and what a machine's limits say of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.checkpoint import DEMO_MODEL

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_BYTES = 2  # of a bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that differ; heads have 128 dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool
    vocabulary: int = 151_936
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def qkv(self) -> int:
        """Outputs of the merged projection on queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' products."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (attention + 3 * self.intermediate)

    @property
    def step_bytes(self) -> int:
        """What every step reads, however few its rows: the layers and the head."""
        return (self.layer_weights + self.vocabulary * self.hidden) * _BYTES

    @property
    def position_bytes(self) -> int:
        """Keys and values of a position."""
        return self.layers * 2 * self.kv_heads * self.head_dim * _BYTES

    def prompt_flop(self, tokens: int) -> float:
        """Operations of a prompt's pass: products, and causal attention."""
        attention = 2 * self.layers * self.heads * self.head_dim * tokens * (tokens + 1)
        return 2.0 * self.layer_weights * tokens + attention

    def save(self, folder: Path) -> None:
        """Writes config.json and a tokenizer into `folder`; weights are left to whoever loads it."""
        config = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "attention_bias": False,
            "eos_token_id": 1,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        for name in _TOKENIZER_FILES:
            shutil.copy(DEMO_MODEL / name, folder / name)


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, True, vocabulary=1280, kv_heads=1, head_dim=32),
    "0.6b": Shape(1024, 3072, 28, 16, True),
    "1.7b": Shape(2048, 6144, 28, 16, True),
    "4b": Shape(2560, 9728, 36, 32, True),
    "8b": Shape(4096, 12_288, 36, 32, False),
}
