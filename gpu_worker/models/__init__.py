"""Model families by the architecture that a checkpoint's config.json names."""

import torch

from gpu_worker.fields import Fields
from gpu_worker.models.interface import Model, ModelConfig
from gpu_worker.models.qwen3 import Qwen3, Qwen3Config

_FAMILIES: dict[str, tuple[type[Qwen3Config], type[Qwen3]]] = {"Qwen3ForCausalLM": (Qwen3Config, Qwen3)}


def read_config(fields: Fields) -> ModelConfig:
    """The configuration of the family that `fields` names; `CheckpointError` where ours cannot serve it."""
    config, _ = _FAMILIES[fields.architecture(tuple(_FAMILIES))]
    return config.read(fields)


def build(config: ModelConfig, dtype: torch.dtype) -> Model:
    """The model in `dtype`, its parameters not filled in yet."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return next(model(config) for kind, model in _FAMILIES.values() if isinstance(config, kind))
    finally:
        torch.set_default_dtype(usual)


__all__ = ["Model", "ModelConfig", "build", "read_config"]
