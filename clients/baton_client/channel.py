"""How this client talks to a server: message limits, keepalive, retries, and the health service's wire names.

Knows nothing about what is asked.
"""

import json
import re

from google.protobuf import wrappers_pb2

from baton_client.errors import InvalidArgumentError
from baton_client.results import HealthStatus

SERVICE = "baton.inference.v1.InferenceService"
DEFAULT_ADDRESS = "127.0.0.1:50051"

# A prompt of a million tokens is about 3 MiB as ids, its text a little more; nothing legitimate comes near.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

# A peer that vanished without closing its connection is noticed after time + timeout, but only while a call
# is open: idle connections stay silent. The server must allow pings this often.
KEEPALIVE_TIME_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

# Retries happen before the first message of an answer only, so nothing is ever generated twice for one
# caller. They bridge a restart or a burst; the server's own delay (grpc-retry-pushback-ms) goes first where
# it sends one.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}


def checked_address(text: str) -> str:
    """`text`, where it names a port or a socket file: gRPC would take 443 for none, and 34463 for 99999.

    IPv6 without brackets does not say where its port begins. Raises InvalidArgumentError.
    """
    port = re.fullmatch(r"(?!(?:ipv6:|dns:)?[0-9a-fA-F]*:[0-9a-fA-F]*:).*[^:]:([0-9]{1,5})", text)
    if not text.startswith("unix:") and (port is None or not 1 <= int(port[1]) <= 65_535):
        raise InvalidArgumentError(f"{text!r} is not HOST:PORT (IPv6 as [::1]:PORT)", field="address")
    return text


def channel_options(*, retries: bool = True) -> list[tuple[str, str | int]]:
    """Return the options of every channel that this client opens."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.enable_retries", int(retries)),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG if retries else {})),
        # Every client has a connection of its own, so several clients reach several front-ends behind one
        # port.
        ("grpc.use_local_subchannel_pool", 1),
    ]


# grpc.health.v1 without its stubs: HealthCheckRequest is one string and HealthCheckResponse one enum, both
# field 1, which is the layout of these two well-known wrappers.
HEALTH_CHECK = "/grpc.health.v1.Health/Check"


def health_request(service: str) -> bytes:
    """Serialize a HealthCheckRequest."""
    return wrappers_pb2.StringValue(value=service).SerializeToString()


def health_status(serialized: bytes) -> HealthStatus:
    """Parse a HealthCheckResponse."""
    value = wrappers_pb2.Int32Value.FromString(serialized).value
    try:
        return HealthStatus(value)
    except ValueError:
        return HealthStatus.UNKNOWN
