"""Errors that clients see: typed here, turned into a gRPC status with google.rpc details by one table.

Whatever is not a `RequestError` is a bug of ours and reaches nobody but the log.
"""

from dataclasses import dataclass
from enum import StrEnum

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

DOMAIN = "baton"


class Reason(StrEnum):
    """What went wrong, for programs: `ErrorInfo.reason`."""

    MALFORMED_REQUEST = "MALFORMED_REQUEST"  # the bytes are no message of this method
    INVALID_FIELD = "INVALID_FIELD"  # a field's value is wrong; BadRequest names it
    TOO_LONG = "TOO_LONG"  # prompt and output do not fit the model
    NO_CHAT_TEMPLATE = "NO_CHAT_TEMPLATE"  # chat was sent to a model that has no template for it
    QUEUE_FULL = "QUEUE_FULL"  # as many requests wait as may
    STREAM_FULL = "STREAM_FULL"  # as many requests as may are on this mux stream and have not ended
    CANCELLED = "CANCELLED"  # the client cancelled this request of a mux stream
    NO_WORKER = "NO_WORKER"  # no worker group can take requests now
    DRAINING = "DRAINING"  # this server is going away
    CORE_LOST = "CORE_LOST"  # the scheduler core lost the request
    NUMERICAL = "NUMERICAL"  # the model's logits were not finite
    QUARANTINED = "QUARANTINED"  # it was running whenever one of several workers failed
    INTERNAL = "INTERNAL"  # a bug of ours


@dataclass(frozen=True, slots=True)
class _Outcome:
    code: grpc.StatusCode
    retry_after_s: float | None = None


_OUTCOMES = {
    Reason.MALFORMED_REQUEST: _Outcome(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.INVALID_FIELD: _Outcome(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.TOO_LONG: _Outcome(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.NO_CHAT_TEMPLATE: _Outcome(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.QUEUE_FULL: _Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=1.0),
    Reason.STREAM_FULL: _Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=1.0),
    Reason.CANCELLED: _Outcome(grpc.StatusCode.CANCELLED),
    Reason.NO_WORKER: _Outcome(grpc.StatusCode.UNAVAILABLE, retry_after_s=1.0),
    Reason.DRAINING: _Outcome(grpc.StatusCode.UNAVAILABLE, retry_after_s=1.0),
    Reason.CORE_LOST: _Outcome(grpc.StatusCode.UNAVAILABLE, retry_after_s=1.0),
    Reason.NUMERICAL: _Outcome(grpc.StatusCode.INTERNAL),
    Reason.QUARANTINED: _Outcome(grpc.StatusCode.INTERNAL),
    Reason.INTERNAL: _Outcome(grpc.StatusCode.INTERNAL),
}


class RequestError(Exception):
    """A request ends without a result. `message` is for people, and safe to show to them."""

    def __init__(
        self, reason: Reason, message: str, *, field: str = "", metadata: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = metadata or {}

    @property
    def code(self) -> grpc.StatusCode:
        """The status code."""
        return _OUTCOMES[self.reason].code

    def status(self) -> Status:
        """The status with its details: ErrorInfo, then BadRequest and RetryInfo where they apply."""
        outcome = _OUTCOMES[self.reason]
        details = [ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)]
        if self.field:
            violation = BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(BadRequest(field_violations=[violation]))
        if outcome.retry_after_s is not None:
            delay = Duration()
            delay.FromMilliseconds(int(outcome.retry_after_s * 1000))
            details.append(RetryInfo(retry_delay=delay))
        packed = [Any() for _ in details]
        for any_, detail in zip(packed, details, strict=True):
            any_.Pack(detail)
        return Status(code=outcome.code.value[0], message=self.message, details=packed)

    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata: the status, and the delay that clients' retry policies obey."""
        trailers: list[tuple[str, str | bytes]] = [
            ("grpc-status-details-bin", self.status().SerializeToString())
        ]
        retry_after_s = _OUTCOMES[self.reason].retry_after_s
        if retry_after_s is not None:
            trailers.append(("grpc-retry-pushback-ms", str(int(retry_after_s * 1000))))
        return tuple(trailers)


def invalid(field: str, message: str) -> RequestError:
    """The error of a field whose value is wrong."""
    return RequestError(Reason.INVALID_FIELD, f"{field}: {message}", field=field)


def internal() -> RequestError:
    """The error that hides a bug of ours."""
    return RequestError(Reason.INTERNAL, "internal error; the server's log has the details")
