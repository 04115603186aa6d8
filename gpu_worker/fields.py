"""Typed access to config.json: every error names the file and the field."""

import json
import math
from pathlib import Path
from typing import Any

from gpu_worker.errors import CheckpointError


class Fields:
    """The fields of a checkpoint's config.json."""

    def __init__(self, path: Path) -> None:
        """Reads `path`. Raises `CheckpointError` where it is missing or no JSON object."""
        self.path = path
        self._fields = read_object(path)

    def error(self, field: str, what: str) -> CheckpointError:
        """An error about `field`."""
        return CheckpointError(f"{self.path}: {field}: {what}")

    def architecture(self, known: tuple[str, ...]) -> str:
        """The architecture, one of `known`."""
        named = self._fields.get("architectures")
        if not isinstance(named, list) or len(named) != 1:
            raise self.error("architectures", f"{named!r} is not a list of one name")
        if named[0] not in known:
            raise self.error("architectures", f"{named[0]!r} is not supported; supported: {', '.join(known)}")
        return str(named[0])

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._fields.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "missing")
        if type(value) is not int or value < 1:
            raise self.error(name, f"{value!r} is not a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        return self._positive(name, self._fields.get(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._fields.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(name, f"{value!r} is neither true nor false")
        return value

    def refuse(self, name: str, *, unless: tuple[object, ...]) -> None:
        """Raises unless the field is absent (null) or has one of the values that are supported."""
        value = self._fields.get(name)
        if not any(
            value is allowed or (value == allowed and type(value) is type(allowed)) for allowed in unless
        ):
            raise self.error(name, f"{_short(value)} is not supported")

    def refuse_layer_types(self, supported: str) -> None:
        """Raises where a layer is of another type than `supported`."""
        types = self._fields.get("layer_types") or []
        if not isinstance(types, list) or any(t != supported for t in types):
            raise self.error("layer_types", f"{_short(types)}: only {supported!r} is supported")

    def rope_theta(self, default: float) -> float:
        """The base of the rotary embedding, from either generation of the format; scaling is refused."""
        self.refuse("partial_rotary_factor", unless=(None, 1, 1.0))
        theta = self._fields.get("rope_theta", default)
        for name in ("rope_scaling", "rope_parameters"):
            settings = self._fields.get(name)
            if settings is None:
                continue
            if not isinstance(settings, dict):
                raise self.error(name, f"{_short(settings)} is not an object")
            kind = settings.get("rope_type", settings.get("type", "default"))
            if kind != "default":
                raise self.error(f"{name}.rope_type", f"{kind!r} is not supported; supported: default")
            if settings.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.error(f"{name}.partial_rotary_factor", "only 1 is supported")
            theta = settings.get("rope_theta", theta)
        return self._positive("rope_theta", theta)

    def _positive(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, f"{_short(value)} is not a positive number")
        return float(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` where it is missing or something else."""
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
