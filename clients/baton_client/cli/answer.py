"""Prints a stream of events as they come: text, or JSON lines, with timing on request."""

import json
import sys
import time
from collections.abc import Iterator

from baton_client.client import Client, Stream
from baton_client.errors import BatonError, UnavailableError
from baton_client.prompt import Prompt
from baton_client.results import Delta, Finish
from baton_client.sampling import Sampling
from baton_client.timing import StreamTimes


def print_answer(
    client: Client, prompt: Prompt, sampling: Sampling, *, as_json: bool = False, stats: bool = False
) -> str:
    """Generate and print the events until they end; return the text. `stats` go to stderr."""
    times = StreamTimes(time.perf_counter())
    texts: list[str] = []
    with client.generate(prompt, sampling) as stream:
        for event in _whole_lines(stream, texts, as_json):
            if isinstance(event, Delta):
                times.add(time.perf_counter(), len(event.token_ids))
                texts.append(event.text)
            if as_json:
                print(json.dumps(_as_dict(event), ensure_ascii=False), flush=True)
            elif isinstance(event, Delta):
                print(event.text, end="", flush=True)
            if isinstance(event, Finish):
                if not as_json:
                    print()
                if stats:
                    print(_summary(event, times), file=sys.stderr)
    return "".join(texts)


def _whole_lines(stream: Stream, texts: list[str], as_json: bool) -> Iterator[Delta | Finish]:
    """The events. An error amid the text is told on a line of its own, as an end and not as an absence."""
    try:
        yield from stream
    except BatonError as error:
        if texts and not as_json:
            print(flush=True)
        if texts and isinstance(error, UnavailableError) and not error.reason:
            raise UnavailableError(f"the server went away amid the answer: {error.message}") from error
        raise


def _as_dict(event: Delta | Finish) -> dict[str, object]:
    if isinstance(event, Delta):
        return {"text": event.text, "token_ids": list(event.token_ids), "index": event.index}
    return {
        "finish": event.reason.value,
        "prompt_tokens": event.usage.prompt_tokens,
        "cached_tokens": event.usage.cached_tokens,
        "completion_tokens": event.usage.completion_tokens,
        "matched_stop": event.matched_stop,
    }


def _summary(finish: Finish, times: StreamTimes) -> str:
    usage = finish.usage
    return (
        f"[{finish.reason.value}; {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached; "
        f"{usage.completion_tokens} generated; {times.summary()}]"
    )
