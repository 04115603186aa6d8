"""The few messages of google.rpc that explain a status: Status, ErrorInfo, BadRequest, RetryInfo.

Declared here in a descriptor pool of their own, field numbers as published, so that the typed client needs
nothing besides grpcio and protobuf and never collides with another copy of the same messages in the process.
Knows nothing about gRPC calls.
"""

from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"string": _FIELD.TYPE_STRING, "int32": _FIELD.TYPE_INT32}

# name → (field number, type, repeated); a type with a leading dot names a message.
_MESSAGES: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Status": {
        "code": (1, "int32", False),
        "message": (2, "string", False),
        "details": (3, ".google.protobuf.Any", True),
    },
    "ErrorInfo": {
        "reason": (1, "string", False),
        "domain": (2, "string", False),
        "metadata": (3, ".google.rpc.Entry", True),  # on the wire, a map is a list of entries
    },
    "Entry": {"key": (1, "string", False), "value": (2, "string", False)},
    "BadRequest": {"field_violations": (1, ".google.rpc.FieldViolation", True)},
    "FieldViolation": {"field": (1, "string", False), "description": (2, "string", False)},
    "RetryInfo": {"retry_delay": (1, ".google.protobuf.Duration", False)},
}


def _declare() -> dict[str, Any]:
    """Return the message classes by name."""
    pool = descriptor_pool.DescriptorPool()
    for known in (any_pb2, duration_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="baton_client/rpc_details.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=[any_pb2.DESCRIPTOR.name, duration_pb2.DESCRIPTOR.name],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind, repeated) in fields.items():
            field = message.field.add(
                name=field_name,
                number=number,
                label=_FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL,
                type=_SCALARS.get(kind, _FIELD.TYPE_MESSAGE),
            )
            if kind not in _SCALARS:
                field.type_name = kind
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _declare()
Status: Any = _CLASSES["Status"]
ErrorInfo: Any = _CLASSES["ErrorInfo"]
BadRequest: Any = _CLASSES["BadRequest"]
RetryInfo: Any = _CLASSES["RetryInfo"]
