"""The checkpoint as the scheduler sees it: where it is, which model it holds, what it says about sampling.

Reads configuration files only. Knows nothing of weights (the worker's) or of tokenization (the front-end's).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton_wire.fingerprint import fingerprint

_HUB_FILES = ("*.json", "*.jinja", "*.safetensors")


class CheckpointError(Exception):
    """A file of the checkpoint is missing or broken; the message names it."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What requests that leave a field unset get."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory, read and checked.

    `eos_token_ids`: those of config.json and generation_config.json. `tokenizer_config`: the file's content,
    {} where there is none.
    """

    path: Path
    name: str
    fingerprint: str
    eos_token_ids: frozenset[int]
    sampling: SamplingDefaults
    tokenizer_config: dict[str, Any]


def locate(model: str) -> Path:
    """The directory of `model`: a path, or a hub id whose files are fetched. Raises `CheckpointError`."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{model}: not a directory; give the directory that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise CheckpointError(f"{model}: no such directory")
    return _fetch(model)


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the library raises its own, its transport's and the system's errors
        raise CheckpointError(
            f"{model}: no such directory, and the model hub did not give it: {type(error).__name__}: {error}"
        ) from error


def load(path: Path, name: str | None = None) -> Checkpoint:
    """The checkpoint in directory `path`, called `name` or as the directory. Raises `CheckpointError`."""
    config = read_json(path / "config.json")
    generation = read_json(path / "generation_config.json", optional=True)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path / 'tokenizer.json'}: missing; a fast tokenizer is needed")
    try:
        digest = fingerprint(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
    return Checkpoint(
        path=path,
        name=name or path.name,
        fingerprint=digest,
        eos_token_ids=_eos(path / "config.json", config) | _eos(path / "generation_config.json", generation),
        sampling=_sampling(path / "generation_config.json", generation),
        tokenizer_config=read_json(path / "tokenizer_config.json", optional=True),
    )


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in `path`; {} where it is missing and `optional`. Raises `CheckpointError`."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _eos(path: Path, config: dict[str, Any]) -> frozenset[int]:
    """`eos_token_id`: absent, null, an id, or a list of ids."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token < 1 << 31 for token in ids):
        raise CheckpointError(f"{path}: eos_token_id: {value!r} is neither a token id nor a list of them")
    return frozenset(ids)


def _sampling(path: Path, generation: dict[str, Any]) -> SamplingDefaults:
    """The defaults; a checkpoint that says `"do_sample": false` wants the most likely token."""

    def number(name: str, default: float, low: float, high: float) -> float:
        value = generation.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{path}: {name}: {value!r} is not a number in [{low:g}, {high:g}]")
        return value

    greedy = generation.get("do_sample") is False
    top_p = number("top_p", 1.0, 0.0, 1.0)
    return SamplingDefaults(
        temperature=0.0 if greedy else float(number("temperature", 1.0, 0.0, 100.0)),
        top_k=int(number("top_k", 0, 0, 2**32 - 1)),
        top_p=float(top_p) or 1.0,  # 0 is written where it means "off"
        min_p=float(number("min_p", 0.0, 0.0, 1.0)),
    )
