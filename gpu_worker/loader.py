"""Weights from safetensors files into a model: every tensor accounted for, or a refusal that names it.

Knows nothing of families: layers say which tensors they are made of (`layers/parts.py`).
"""

import logging
import re
import sys
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from gpu_worker.errors import CheckpointError
from gpu_worker.fields import read_object
from gpu_worker.layers.parts import Layer, parts_of, walk

log = logging.getLogger(__name__)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
_DTYPES = ("F32", "BF16", "F16")
_DERIVED = ("rotary_emb.inv_freq",)  # written by old tools, computed by everybody
_MAX_NAMED = 5


def locate(model: str) -> Path:
    """The directory of `model`: a path, or a hub id whose files are fetched. Raises `CheckpointError`."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{model}: not a directory; give the directory that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise CheckpointError(f"{model}: no such directory")
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:  # the library raises its own, its transport's and the system's errors
        kind = type(error).__name__
        raise CheckpointError(
            f"{model}: no such directory, and the hub did not give it: {kind}: {error}"
        ) from error


def load(model: Layer, folder: Path) -> None:
    """Fills the model's parameters and brings its layers into their final layout.

    Raises `CheckpointError` for tensors that are missing, left over, of another shape or of a dtype that is
    not a plain float, and for files that are missing or damaged.
    """
    wanted = dict(parts_of(model))
    files = _files(folder)
    _account(folder, wanted, {name for names in files.values() for name in names}, model)
    progress = tqdm(total=len(wanted), desc="Loading weights", unit="tensor", disable=not sys.stderr.isatty())
    with torch.inference_mode(), progress:
        for path, names in files.items():
            with _open(path) as file:
                for name in names:
                    if name in wanted:
                        _copy(path, name, file, wanted[name])
                        progress.update()
        for _, layer in walk(model):
            layer.prepare()


def fill(model: Layer) -> None:
    """Random weights in place of a checkpoint's, small enough that activations stay finite."""
    with torch.inference_mode():
        for name, view in parts_of(model):
            if "norm" in name:
                view.fill_(1.0)
            else:
                view.normal_(0.0, 0.02)
        for _, layer in walk(model):
            layer.prepare()


def _files(folder: Path) -> dict[Path, list[str]]:
    """Tensor names by file, checked: what the index says is there."""
    index = folder / _INDEX
    if not index.exists():
        path = folder / _SINGLE
        if not path.is_file():
            raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
        with _open(path) as file:
            return {path: list(file.keys())}
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: weight_map: not an object of file names")
    files = defaultdict(list)
    for name, place in places.items():
        if Path(place).name != place:
            raise CheckpointError(f"{index}: weight_map: {place!r} is not the name of a file beside it")
        files[folder / place].append(name)
    for path, names in files.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but named by {_INDEX}")
        with _open(path) as file:
            absent = set(names) - set(file.keys())
            if absent:
                raise CheckpointError(f"{path}: {_some(absent)} missing, but promised by {_INDEX}")
    return dict(files)


def _open(path: Path) -> AbstractContextManager[Any]:
    """The safetensors file, lazily read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from error


def _account(folder: Path, wanted: dict[str, Tensor], found: set[str], model: Layer) -> None:
    """Refuses missing and left-over tensors by name."""
    missing = wanted.keys() - found
    if missing:
        raise CheckpointError(f"{folder}: {_some(missing)} missing from the weights")
    tied = {"lm_head.weight"} if "lm_head.weight" not in wanted else set()  # may be written, is not used
    extra = {name for name in found - wanted.keys() - tied if not name.endswith(_DERIVED)}
    if extra:
        raise CheckpointError(
            f"{folder}: {_some(extra)} not part of a {type(model).__name__} of this configuration"
        )


def _copy(path: Path, name: str, file: Any, view: Tensor) -> None:
    """One tensor, converted to the model's dtype."""
    stored = file.get_slice(name)
    if stored.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name}: dtype {stored.get_dtype()} is not supported ({', '.join(_DTYPES)})"
        )
    if tuple(stored.get_shape()) != tuple(view.shape):
        raise CheckpointError(
            f"{path}: {name}: shape {stored.get_shape()}, the model needs {list(view.shape)}"
        )
    try:
        view.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error


def _some(names: set[str]) -> str:
    """A few of the names, and how many more there are."""
    listed = ", ".join(sorted(names)[:_MAX_NAMED])
    more = len(names) - _MAX_NAMED
    return f"{listed} and {more} more" if more > 0 else listed
