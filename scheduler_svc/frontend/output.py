"""One request's tokens become the events that its client sees. Pure: knows neither the core nor gRPC."""

from collections.abc import Sequence
from typing import NamedTuple

from baton.inference.v1 import inference_pb2 as pb
from scheduler_svc.frontend.detokenizer import Detokenizer
from scheduler_svc.frontend.stop_strings import StopMatcher


class Piece(NamedTuple):
    """More output: the fields of a Delta, without the cost of one."""

    text: str
    tokens: list[int]
    first: int

    def write(self, delta: pb.Delta) -> None:
        """Fills an empty event, which in place takes half the time of making one and copying it."""
        if self.text:
            delta.text = self.text
        delta.token_ids.extend(self.tokens)
        delta.index = self.first


class Output:
    """Events of one request. Once `matched_stop` is set no further tokens are wanted: `finish` it."""

    __slots__ = ("_count", "_detokenizer", "_matcher", "_prompt_tokens")

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], prompt_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._prompt_tokens = prompt_tokens
        self._count = 0  # tokens put into events, so the index of the next

    @property
    def matched_stop(self) -> str | None:
        """The stop string that the text has reached."""
        return None if self._matcher is None else self._matcher.matched

    def advance(self, tokens: list[int], *, last: bool) -> Piece | None:
        """What these tokens add, up to the one that completes a stop string; None where it says nothing.

        `last`: no token follows these, so that text which waited for one goes out.
        """
        text = ""
        if self._matcher is None:
            text = self._detokenizer.push(tokens)
        else:
            tokens, text = self._match(tokens, self._matcher)
        if last:
            text += self._rest()
        if not tokens and not text:
            return None
        piece = Piece(text, tokens, self._count)
        self._count += len(tokens)
        return piece

    def finish(self, reason: pb.FinishReason, cached_tokens: int) -> pb.Finish:
        """The last event; a stop string that matched is the reason before any other."""
        matched = self.matched_stop
        return pb.Finish(
            reason=reason if matched is None else pb.FINISH_REASON_STOP,
            usage=pb.Usage(
                prompt_tokens=self._prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=self._count,
            ),
            matched_stop=matched or "",
        )

    def _match(self, tokens: list[int], matcher: StopMatcher) -> tuple[list[int], str]:
        """Token by token, to know which one completes a stop string."""
        texts = []
        for place, token in enumerate(tokens):
            texts.append(matcher.push(self._detokenizer.push((token,))))
            if matcher.matched is not None:
                tokens = tokens[: place + 1]
                break
        return tokens, "".join(texts)

    def _rest(self) -> str:
        if self._matcher is None:
            return self._detokenizer.finish()
        if self._matcher.matched is not None:
            return ""
        text = self._matcher.push(self._detokenizer.finish())
        return text + self._matcher.finish()
