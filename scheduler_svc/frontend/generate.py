"""The methods of the inference service, free of gRPC: a request in, events out, errors as `RequestError`."""

from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import TypeVar

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.frontend import Service
from scheduler_svc.frontend import prompt as prompts
from scheduler_svc.frontend import sampling as samplings
from scheduler_svc.frontend import validation
from scheduler_svc.frontend.core_link import CoreLink
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.generation import Generation
from scheduler_svc.frontend.model import Model, describe, longest_sequence
from scheduler_svc.frontend.output import Output, Piece
from scheduler_svc.frontend.stream import Inbox, Stream

S = TypeVar("S", bound=Inbox)


def _response(piece: Piece) -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    piece.write(response.delta)
    return response


class Inference:
    """The service's commands over one model and one link to the core."""

    def __init__(self, model: Model, core: CoreLink) -> None:
        self._model = model
        self._core = core
        self.draining = False

    async def begin(self, request: pb.GenerateRequest, kind: Callable[[int], S]) -> Generation[S]:
        """A request checked and given to the core, its stream of the given kind; the caller closes it."""
        if self.draining:
            raise RequestError(Reason.DRAINING, "this server is going away; try another, or again")
        validation.check_sampling(request.sampling)
        validation.check_stopping(request.stopping)
        service = self._service()
        longest = longest_sequence(service)
        validation.check_stop_ids(request.stopping, service.vocab_size)
        stop_ids = samplings.stop_ids(request.stopping, self._model.eos_token_ids)
        prompt = await prompts.ids_of(request, self._model, vocab_size=service.vocab_size, longest=longest)
        budget = validation.output_budget(
            request.stopping,
            prompt_field=request.WhichOneof("prompt") or "",
            prompt_tokens=len(prompt),
            longest=longest,
            default_max_tokens=self._model.default_max_tokens,
        )
        output = Output(self._model.codec.detokenization.new(), request.stopping.stop, len(prompt))
        stream = self._core.open(
            kind,
            prompt,
            max_tokens=budget,
            min_tokens=request.stopping.min_tokens,
            sampling=samplings.resolve(request.sampling, self._model.checkpoint.sampling),
            stop_ids=stop_ids,
        )
        return Generation(stream, output, self._core.release)

    async def generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        """Events of one request. Closing the iterator withdraws it."""
        with closing(await self.begin(request, Stream)) as generation:
            while True:
                piece = generation.advance(await generation.stream.take())
                if generation.is_over:
                    break  # withdraws at once, if it was a stop string
                if piece is not None:
                    yield _response(piece)
        if piece is not None:
            yield _response(piece)
        yield pb.GenerateResponse(finish=generation.finish())

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """The ids that `generate` would use."""
        if request.WhichOneof("prompt") is None:
            raise RequestError(
                Reason.INVALID_FIELD, "prompt: one of text and chat must be set", field="prompt"
            )
        text = await prompts.text_of(request, self._model)
        return pb.TokenizeResponse(token_ids=await prompts.ids_of_text(request, text, self._model), text=text)

    async def get_model(self, _: pb.GetModelRequest) -> pb.GetModelResponse:
        """What is served now."""
        return describe(self._model, self._core.service)

    def _service(self) -> Service:
        """What the core can do, once some worker group has told its limits."""
        service = self._core.service
        if service is None:
            raise RequestError(Reason.CORE_LOST, "the scheduler core is not connected")
        if service.vocab_size == 0:
            raise RequestError(Reason.NO_WORKER, "no worker has been ready yet")
        return service
