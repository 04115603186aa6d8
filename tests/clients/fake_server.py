"""A small server of the public API in this process: tokens are the bytes of the prompt, repeated.

It answers what a client can see and can be told to fail in a given way; it schedules nothing.
"""

import itertools
import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc

SERVICE = "baton.inference.v1.InferenceService"


def status(code, message, *, reason="", metadata=None, field="", retry_after_s=None):
    """A google.rpc.Status with the details that Baton promises, from the published messages."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="baton", metadata=metadata)]
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_s is not None:
        delay = duration_pb2.Duration(seconds=int(retry_after_s), nanos=int(retry_after_s % 1 * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [any_pb2.Any() for _ in details]
    for box, detail in zip(packed, details, strict=True):
        box.Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


class FakeService(inference_pb2_grpc.InferenceServiceServicer):
    """`failures` are met one per call, before its first event; `failure_after` is (events, status)."""

    def __init__(self):
        self.requests = []
        self.failures = []
        self.failure_after = None
        self.token_delay_s = 0.0
        self.forget_finish = False
        self.running = 0
        self.peak = 0
        self._lock = threading.Lock()

    def Generate(self, request, context):  # noqa: N802  # the .proto's name
        self.requests.append(request)
        self._fail(context)
        with self._lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
        try:
            yield from self._events(request, context)
        finally:
            with self._lock:
                self.running -= 1

    def GenerateMux(self, requests, context):  # noqa: N802
        """One request after another; a cancel is recorded, and comes too late."""
        for message in requests:
            self.requests.append(message)
            if not message.HasField("start"):
                continue
            if self.failures:
                error = pb.MuxError.FromString(self.failures.pop(0).SerializeToString())
                events = [pb.MuxEvent(id=message.start.id, error=error)]
            else:
                events = [
                    _mux_event(message.start.id, e) for e in self._events(message.start.request, context)
                ]
            yield pb.GenerateMuxResponse(events=events)

    def _events(self, request, context):
        prompt = self._ids(request)
        limit = request.stopping.max_tokens if request.stopping.HasField("max_tokens") else 2 * len(prompt)
        for index, token_id in enumerate(itertools.islice(itertools.cycle(prompt), limit)):
            if self.failure_after and index == self.failure_after[0]:
                context.abort_with_status(rpc_status.to_status(self.failure_after[1]))
            if not context.is_active():
                return
            text = bytes([token_id % 128]).decode()
            yield pb.GenerateResponse(delta=pb.Delta(text=text, token_ids=[token_id], index=index))
            time.sleep(self.token_delay_s)
        if not self.forget_finish:
            usage = pb.Usage(prompt_tokens=len(prompt), cached_tokens=1, completion_tokens=limit)
            yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_LENGTH, usage=usage))

    def Tokenize(self, request, context):  # noqa: N802
        self._fail(context)
        text = self._text(request)
        return pb.TokenizeResponse(token_ids=list(text.encode()), text=text)

    def GetModel(self, request, context):  # noqa: N802
        self._fail(context)
        return pb.GetModelResponse(
            name="bytes",
            fingerprint="ab" * 16,
            max_model_len=4096,
            vocab_size=256,
            eos_token_ids=[0],
            default_sampling=pb.Sampling(temperature=0.5, top_k=20),
            default_max_tokens=1024,
            supports_chat=True,
            ready_groups=1,
            block_size=16,
        )

    def _fail(self, context):
        if self.failures:
            context.abort_with_status(rpc_status.to_status(self.failures.pop(0)))

    def _ids(self, request):
        return list(request.token_ids.ids) or list(self._text(request).encode())

    def _text(self, request):
        if request.WhichOneof("prompt") == "chat":
            return "".join(f"<{m.role}>{m.content}" for m in request.chat.messages)
        return request.text


def _mux_event(number, event):
    which = event.WhichOneof("event")
    return pb.MuxEvent(id=number, **{which: getattr(event, which)})


class FakeServer:
    """The running server: `service` to look into, `health` to change, `address` to dial."""

    def __init__(self, port=0):
        self.service = FakeService()
        self.health = health.HealthServicer()
        self.health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=64), options=[("grpc.so_reuseport", 0)]
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def set_health(self, serving):
        response = health_pb2.HealthCheckResponse
        self.health.set(SERVICE, response.SERVING if serving else response.NOT_SERVING)

    def close(self):
        self._server.stop(0).wait()


@contextmanager
def fake_server():
    server = FakeServer()
    try:
        yield server
    finally:
        server.close()
