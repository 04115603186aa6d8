"""The methods of the inference service, free of gRPC: a request in, events out, errors as `RequestError`."""

from collections.abc import AsyncIterator

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.frontend import Service, Verdict
from scheduler_svc.frontend import prompt as prompts
from scheduler_svc.frontend import sampling as samplings
from scheduler_svc.frontend import validation
from scheduler_svc.frontend.core_link import CoreLink
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.model import Model, describe, longest_sequence
from scheduler_svc.frontend.output import Output

_REASONS = {
    Verdict.STOP: pb.FINISH_REASON_STOP,
    Verdict.LENGTH: pb.FINISH_REASON_LENGTH,
}


def _failure(verdict: Verdict) -> RequestError:
    """The error of a verdict that is no finish."""
    match verdict:
        case Verdict.NO_WORKER:
            return RequestError(Reason.NO_WORKER, "no worker took the request in time; try again")
        case Verdict.QUEUE_FULL:
            return RequestError(Reason.QUEUE_FULL, "as many requests wait as may; try again")
        case Verdict.TOO_LONG:
            field = "stopping.max_tokens"
            message = f"{field}: prompt and output do not fit the cache of any worker group"
            return RequestError(Reason.TOO_LONG, message, field=field)
        case _:
            return RequestError(Reason.NUMERICAL, "the model's output was not a finite number")


def _finish(output: Output, over: Verdict | RequestError | None, cached_tokens: int) -> pb.Finish:
    """The last event; raises where the request failed. A stop string comes before whatever the core says."""
    if output.matched_stop is not None:
        return output.finish(pb.FINISH_REASON_STOP, cached_tokens)
    if isinstance(over, RequestError):
        raise over
    assert over is not None
    if over not in _REASONS:
        raise _failure(over)
    return output.finish(_REASONS[over], cached_tokens)


class Inference:
    """The service's commands over one model and one link to the core."""

    def __init__(self, model: Model, core: CoreLink) -> None:
        self._model = model
        self._core = core
        self.draining = False

    async def generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        """Events of one request. Closing the iterator withdraws it."""
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
        with self._core.submit(
            prompt,
            max_tokens=budget,
            min_tokens=request.stopping.min_tokens,
            sampling=samplings.resolve(request.sampling, self._model.checkpoint.sampling),
            stop_ids=stop_ids,
        ) as stream:
            while True:
                news = await stream.take()
                delta = output.delta(news.tokens, last=news.over in _REASONS)
                if news.over is not None or output.matched_stop is not None:
                    break  # withdraws at once, if it was a stop string
                if delta is not None:
                    yield pb.GenerateResponse(delta=delta)
        if delta is not None:
            yield pb.GenerateResponse(delta=delta)
        yield pb.GenerateResponse(finish=_finish(output, news.over, stream.cached_tokens))

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
            raise RequestError(Reason.CORE_LOST, "the scheduler core is not connected; try again")
        if service.vocab_size == 0:
            raise RequestError(Reason.NO_WORKER, "no worker has been ready yet; try again")
        return service
