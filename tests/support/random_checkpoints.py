"""Random checkpoints in the published format, small enough for a test: weights, configuration, tokenizer."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BYTES = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Shape:
    """A Qwen3 configuration, and how its weights are drawn and stored."""

    vocab_size: int = 320
    hidden_size: int = 48
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    std: float = 0.1
    seed: int = 0
    dtype: torch.dtype = torch.float32
    shards: int = 1
    rope_parameters: bool = False  # the newer spelling of rope_theta
    more: dict[str, Any] = field(default_factory=dict)  # further fields of config.json

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        fields = asdict(self)
        for ours in ("std", "seed", "dtype", "shards", "rope_parameters", "more"):
            del fields[ours]
        if self.rope_parameters:
            fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        fields |= {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "eos_token_id": BYTES + SPECIAL.index("<|im_end|>"),
            "bos_token_id": None,
        }
        return fields | self.more

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights by name, drawn from the seed."""
        random = torch.Generator().manual_seed(self.seed)
        drawn = {
            name: torch.randn(shape, generator=random) * self.std for name, shape in self._shapes().items()
        }
        for name, value in drawn.items():
            if name.endswith("norm.weight"):
                value += 1
        return {name: value.to(self.dtype) for name, value in drawn.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        h, i = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for n in range(self.num_hidden_layers):
            layer = f"model.layers.{n}."
            shapes |= {
                f"{layer}input_layernorm.weight": (h,),
                f"{layer}self_attn.q_proj.weight": (q, h),
                f"{layer}self_attn.k_proj.weight": (kv, h),
                f"{layer}self_attn.v_proj.weight": (kv, h),
                f"{layer}self_attn.o_proj.weight": (h, q),
                f"{layer}self_attn.q_norm.weight": (self.head_dim,),
                f"{layer}self_attn.k_norm.weight": (self.head_dim,),
                f"{layer}post_attention_layernorm.weight": (h,),
                f"{layer}mlp.gate_proj.weight": (i, h),
                f"{layer}mlp.up_proj.weight": (i, h),
                f"{layer}mlp.down_proj.weight": (h, i),
            }
            if self.attention_bias:
                sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": h}
                shapes |= {f"{layer}self_attn.{name}.bias": (size,) for name, size in sizes.items()}
        shapes["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes


def tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer in which every id has a text: bytes, special tokens, made words."""
    vocabulary = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"Ġw{i}": i for i in range(BYTES + len(SPECIAL), vocab_size)}
    vocabulary |= {text: BYTES + i for i, text in enumerate(SPECIAL)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def write_checkpoint(folder: Path, shape: Shape | None = None, *, with_tokenizer: bool = True) -> Path:
    """Writes the checkpoint of `shape` into `folder`, made if need be; returns `folder`."""
    shape = shape or Shape()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    _write_weights(folder, shape)
    if with_tokenizer:
        assert shape.vocab_size >= BYTES + len(SPECIAL), "too few ids for all bytes and the special tokens"
        tokenizer(shape.vocab_size).save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": shape.max_position_embeddings,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def _write_weights(folder: Path, shape: Shape) -> None:
    tensors = shape.tensors()
    if shape.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    total = 0
    for i in range(shape.shards):
        name = f"model-{i + 1:05}-of-{shape.shards:05}.safetensors"
        part = dict(list(tensors.items())[i :: shape.shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
        total += sum(value.numel() * value.element_size() for value in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
