"""Checkpoint directories without weights: what the scheduler reads of a model."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.support.tokenizers_zoo import SPECIAL, byte_level

CHATML = """\
{%- for message in messages %}
{{- '<|start|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}"""


def write_checkpoint(
    path: Path,
    *,
    tokenizer: Tokenizer | None = None,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    chat_template: str | None = CHATML,
) -> Path:
    """A directory that `checkpoint.load` takes; what is not given is plain."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", {"model_type": "qwen3"} if config is None else config)
    if generation is not None:
        write_json(path / "generation_config.json", generation)
    if tokenizer_config is None:
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL}
    write_json(path / "tokenizer_config.json", tokenizer_config)
    (byte_level() if tokenizer is None else tokenizer).save(str(path / "tokenizer.json"))
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template)
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file, as checkpoints have it."""
    path.write_text(json.dumps(content))
