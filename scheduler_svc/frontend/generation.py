"""One request that the core works on, and what its client is to see of it. Knows nothing of gRPC.

Whoever writes to the client hands the news of the stream in, and gets pieces and the end out.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.frontend import Verdict
from scheduler_svc.frontend.errors import Reason, RequestError
from scheduler_svc.frontend.output import Output, Piece
from scheduler_svc.frontend.stream import Inbox, News

S_co = TypeVar("S_co", bound=Inbox, covariant=True)
_REASONS = {
    Verdict.STOP: pb.FINISH_REASON_STOP,
    Verdict.LENGTH: pb.FINISH_REASON_LENGTH,
}


def _failure(verdict: Verdict) -> RequestError:
    """The error of a verdict that is no finish."""
    match verdict:
        case Verdict.NO_WORKER:
            return RequestError(Reason.NO_WORKER, "no worker took the request in time")
        case Verdict.QUEUE_FULL:
            return RequestError(Reason.QUEUE_FULL, "as many requests wait as may")
        case Verdict.TOO_LONG:
            field = "stopping.max_tokens"
            message = f"{field}: prompt and output do not fit the cache of any worker group"
            return RequestError(Reason.TOO_LONG, message, field=field)
        case Verdict.QUARANTINED:
            message = "several workers failed while they ran this request: it is not tried again"
            return RequestError(Reason.QUARANTINED, message)
        case _:
            return RequestError(Reason.NUMERICAL, "the model's output was not a finite number")


class Generation(Generic[S_co]):
    """From its submission until `close`, which withdraws it where the core is not done; twice is fine.

    `stream` is where the news comes from. Once `is_over`, `finish` says how it ended.
    """

    __slots__ = ("_close", "_output", "_over", "is_over", "stream")

    def __init__(self, stream: S_co, output: Output, close: Callable[[Inbox], None]) -> None:
        """`close`: lets go of the stream."""
        self.stream = stream
        self.is_over = False
        self._over: Verdict | RequestError | None = None
        self._output = output
        self._close = close

    def advance(self, news: News) -> Piece | None:
        """What the client sees of the news; None where it is nothing."""
        output = self._output
        piece = output.advance(news.tokens, last=news.over in _REASONS)
        if news.over is not None or output.matched_stop is not None:
            self._over, self.is_over = news.over, True
        return piece

    def finish(self) -> pb.Finish:
        """The last event; raises where the request failed. A stop string comes before what the core says."""
        assert self.is_over
        over, output, cached_tokens = self._over, self._output, self.stream.cached_tokens
        if output.matched_stop is not None:
            return output.finish(pb.FINISH_REASON_STOP, cached_tokens)
        if isinstance(over, RequestError):
            raise over
        assert over is not None
        if over not in _REASONS:
            raise _failure(over)
        return output.finish(_REASONS[over], cached_tokens)

    def close(self) -> None:
        """Nothing more is wanted."""
        self._close(self.stream)
