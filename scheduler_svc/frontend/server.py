"""The gRPC server: which services it offers, its options, its port. What the methods do is elsewhere."""

from functools import partial

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from baton.inference.v1 import inference_pb2 as pb
from scheduler_svc.frontend import guard, health, mux
from scheduler_svc.frontend.generate import Inference
from scheduler_svc.frontend.health import Health
from scheduler_svc.port import PortInUseError

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_MESSAGE_BYTES = 16 << 20  # either way; a million tokens of text fit
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A client that vanished is noticed within half a minute; clients may ask as often.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def build(inference: Inference, status: Health, *, shares_port: bool = False) -> grpc.aio.Server:
    """A server that offers everything, not yet bound. A port in use is refused, unless it `shares_port`."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", int(shares_port)), *_OPTIONS])
    methods = {
        "Generate": guard.streaming(pb.GenerateRequest, inference.generate),
        "GenerateMux": guard.bidirectional(pb.GenerateMuxRequest, partial(mux.serve, inference)),
        "Tokenize": guard.unary(pb.TokenizeRequest, inference.tokenize),
        "GetModel": guard.unary(pb.GetModelRequest, inference.get_model),
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(INFERENCE, methods), status.handler())
    )
    _add_reflection(server)
    return server


def _add_reflection(server: grpc.aio.Server) -> None:
    """Reflection v1alpha, and v1 under the same messages; v1 is not listed, since its schema is not here."""
    names = (INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )


def bind(server: grpc.aio.Server, listen: str) -> str:
    """Binds to host:port; the address with the port that was picked. Raises `PortInUseError`."""
    host = listen.rpartition(":")[0]
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError:
        bound = 0
    if not bound:
        raise PortInUseError(listen)
    return f"{host}:{bound}"
