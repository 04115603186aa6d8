"""A checkpoint with the shape of a real model and random weights, for measurements that need no sense.

Its tokenizer is the demo model's, which knows only the first ids; prompts are token ids.
"""

import shutil
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_shaped(folder: Path, *, layers: int = 4, vocab_size: int = 151_936) -> None:
    """Save a checkpoint into `folder` with the layer shape of Qwen3-0.6B: bfloat16, tied, `layers` deep."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copy(DEMO_MODEL / name, folder / name)
