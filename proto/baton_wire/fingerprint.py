"""Which model a directory holds, as one number that scheduler and worker compute apart and compare.

Covers configuration, tokenizer, chat template and the weight index (names, shapes, files), not the weights'
bytes: a digest of those would read the whole checkpoint. Knows nothing about what the files mean.
"""

import struct
from pathlib import Path

import xxhash

_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
_MAX_HEADER_BYTES = 100 << 20


def fingerprint(model: Path) -> str:
    """Hexadecimal digest (128 bits) of the checkpoint directory `model`.

    Raises `FileNotFoundError` where it holds no config.json, `OSError` where a file cannot be read.
    """
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no config.json: not a checkpoint directory")
    digest = xxhash.xxh3_128()
    for name in _FILES:
        path = model / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(struct.pack("<Q", len(content)) + content)
    if not (model / _FILES[-1]).is_file():
        digest.update(_weight_header(model / "model.safetensors"))
    return digest.hexdigest()


def _weight_header(path: Path) -> bytes:
    """The JSON header of a safetensors file: names, dtypes, shapes; empty where there is no such file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        return file.read(min(size, _MAX_HEADER_BYTES))
