"""Errors as statuses: one ErrorInfo always, the other details where they belong."""

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from scheduler_svc.frontend.errors import Reason, RequestError, invalid


def details_of(error):
    status = Status.FromString(dict(error.trailers())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code.value[0], error.message)
    found = {}
    for packed in status.details:
        assert isinstance(packed, Any)
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                message = kind()
                packed.Unpack(message)
                found[kind] = message
    return found


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_status(reason):
    details = details_of(RequestError(reason, "words", metadata={"a": "b"}))
    info = details.pop(ErrorInfo)
    assert (info.domain, info.reason, dict(info.metadata)) == ("baton", reason.value, {"a": "b"})
    assert BadRequest not in details


def test_a_wrong_field_is_named():
    error = invalid("sampling.top_p", "2 is not in [0, 1]")
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details_of(error)[BadRequest].field_violations
    assert violation.field == "sampling.top_p"
    assert violation.description == "sampling.top_p: 2 is not in [0, 1]"


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.NO_WORKER, Reason.DRAINING, Reason.CORE_LOST])
def test_where_trying_again_helps_it_says_when(reason):
    error = RequestError(reason, "later")
    assert details_of(error)[RetryInfo].retry_delay.ToMilliseconds() == 1000
    assert dict(error.trailers())["grpc-retry-pushback-ms"] == "1000"
