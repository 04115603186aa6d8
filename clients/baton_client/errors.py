"""What can go wrong, as exceptions: one class per kind of answer a caller would treat differently.

`error_of` reads a failed gRPC call, `error_of_status` a failed request of a mux stream. Knows nothing about
requests or streams.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton_client import rpc_details

_DETAILS_KEY = "grpc-status-details-bin"
_NONE: Mapping[str, str] = MappingProxyType({})


class BatonError(Exception):
    """Anything that Baton's client raises on purpose.

    `code` is the gRPC status, None where no call was made. `reason` is the machine-readable cause in capitals
    (google.rpc.ErrorInfo), with `metadata` to it. `retry_after_s` is the server's advice, None where it gave
    none.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] = _NONE,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = metadata
        self.retry_after_s = retry_after_s


class InvalidArgumentError(BatonError, ValueError):
    """The request breaks a rule; sending it again will not help. `field` names the first culprit or is ""."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] = _NONE,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, reason=reason, metadata=metadata, retry_after_s=retry_after_s)
        self.field = field


class UnavailableError(BatonError):
    """Nobody can serve now: no server at the address, no worker ready, or the server is draining."""


class ExhaustedError(BatonError):
    """A limit is reached, the queue most often; `retry_after_s` says when to come back."""


class DeadlineError(BatonError):
    """The call's `timeout_s` passed before it ended."""


class CallCancelledError(BatonError):
    """The call was cancelled, by this side or on the way."""


class UnimplementedError(BatonError):
    """The server does not offer this method: an older version, or another service at this address."""


class InternalError(BatonError):
    """A fault of the server (or of its numbers: reason NUMERICAL); nothing in the request explains it."""


_CLASSES: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(slots=True)
class _Details:
    """What the google.rpc details of a status say."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    field: str = ""
    retry_after_s: float | None = None


def error_of(
    code: grpc.StatusCode,
    message: str | None,
    trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
) -> BatonError:
    """Return the exception for a call that ended with `code`; never raises on details that cannot be read."""
    details = _Details()
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            details = _read_details(value)
    return _error(code, message, details)


def error_of_status(serialized: bytes) -> BatonError:
    """Return the exception for a serialized google.rpc.Status, as a request of a mux stream ends with."""
    status = rpc_details.Status.FromString(serialized)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _error(code, status.message, _read_details(serialized))


def _error(code: grpc.StatusCode, message: str | None, details: _Details) -> BatonError:
    text = message or code.name.lower().replace("_", " ")
    cls = _CLASSES.get(code, BatonError)
    if issubclass(cls, InvalidArgumentError):
        return cls(text, code=code, reason=details.reason, metadata=details.metadata, field=details.field)
    return cls(
        text,
        code=code,
        reason=details.reason,
        metadata=details.metadata,
        retry_after_s=details.retry_after_s,
    )


def error_of_call(error: Any) -> BatonError:
    """Return the exception for a grpc.RpcError of the blocking API, which is also the failed grpc.Call."""
    return error_of(error.code(), error.details(), error.trailing_metadata())


def _read_details(serialized: bytes) -> _Details:
    """Read a serialized google.rpc.Status; what is unknown or broken is left out."""
    found = _Details()
    try:
        for packed in rpc_details.Status.FromString(serialized).details:
            match packed.type_url.rpartition("/")[2]:
                case "google.rpc.ErrorInfo":
                    info = rpc_details.ErrorInfo.FromString(packed.value)
                    found.reason = info.reason
                    found.metadata = {entry.key: entry.value for entry in info.metadata}
                case "google.rpc.BadRequest":
                    violations = rpc_details.BadRequest.FromString(packed.value).field_violations
                    found.field = violations[0].field if violations else ""
                case "google.rpc.RetryInfo":
                    delay = rpc_details.RetryInfo.FromString(packed.value).retry_delay
                    found.retry_after_s = delay.seconds + delay.nanos / 1e9
    except DecodeError:
        pass
    return found
