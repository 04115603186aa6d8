"""What `make demo` runs: starts a stack, streams three answers at once, says how fast, and stops the stack.

Goes through the public client only. Knows nothing about what the demo model was trained on but its questions.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton_client import (
    AsyncClient,
    BatonError,
    ChatMessage,
    Client,
    Delta,
    Finish,
    Model,
    Prompt,
    Sampling,
    Stack,
    StackError,
    StackOptions,
)
from baton_client.cli.console import spinner
from baton_client.stack import DEMO_MODEL_NAME
from baton_client.timing import StreamTimes, describe, percentile
from demo.panels import Display, display

MODEL_DIR = Path(__file__).with_name("model")
# Headings of corpus.md: the demo model knows these answers by heart.
TRAINED_QUESTIONS = ("What is Baton?", "How does a request travel through Baton?", "What is a plan?")
GENERAL_QUESTIONS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a short poem about a relay race.",
    "How do I make a good cup of tea?",
)
GENERAL_TEXTS = (
    "The sky is blue because",
    "Once upon a time, in a village by the sea,",
    "The three most important inventions are",
)


@dataclass(slots=True)
class Answer:
    """One stream: what was asked, what has come so far and when."""

    question: str
    text: str = ""
    times: StreamTimes = field(default_factory=lambda: StreamTimes(time.perf_counter()))
    finish: Finish | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description="Serve a small model and stream three answers at once.")
    parser.add_argument(
        "--model", default=str(MODEL_DIR), help="checkpoint folder or hub id (default: the demo model)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=200, help="the longest answer (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _demo(arguments.model, arguments.max_tokens)
    except BatonError as error:
        print(f"demo: {error.message}", file=sys.stderr)
        return error.exit_code if isinstance(error, StackError) else 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(model_path: str, max_tokens: int) -> None:
    started = time.perf_counter()
    trained = Path(model_path).resolve() == MODEL_DIR.resolve()
    name = ("--served-model-name", DEMO_MODEL_NAME) if trained else ()
    with spinner("starting the stack") as show:
        stack = Stack.start(StackOptions(model=model_path, scheduler_args=name), show)
    with stack:
        with Client(stack.address) as client:
            model = client.model()
        print(f"{model.name} is served at {stack.address} ({time.perf_counter() - started:.1f} s to start)\n")
        sampling = Sampling(temperature=0.0 if trained else None, max_tokens=max_tokens)
        questions = _questions(model, trained=trained)
        with display(questions) as panels:
            answers = asyncio.run(_ask_all(stack.address, model, questions, sampling, panels))
        print(f"\n{_report(answers)}")
        stack.check()
    print("Stopped. Keep a stack running with `make up`, and talk to it with `baton chat`.")


def _questions(model: Model, *, trained: bool) -> Sequence[str]:
    if trained:
        return TRAINED_QUESTIONS
    return GENERAL_QUESTIONS if model.supports_chat else GENERAL_TEXTS


async def _ask_all(
    address: str, model: Model, questions: Sequence[str], sampling: Sampling, panels: Display
) -> list[Answer]:
    """Ask all questions at once over one connection; return the answers in order."""
    async with AsyncClient(address) as client:
        await client.model()  # the connection is made before any clock starts
        answers = [Answer(question) for question in questions]
        prompts: list[Prompt] = [
            [ChatMessage("user", question)] if model.supports_chat else question for question in questions
        ]
        asked = zip(range(len(answers)), answers, prompts, strict=True)
        await asyncio.gather(*(_ask(client, *one, sampling, panels) for one in asked))
    return answers


async def _ask(
    client: AsyncClient, index: int, answer: Answer, prompt: Prompt, sampling: Sampling, panels: Display
) -> None:
    async with client.generate(prompt, sampling) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                answer.times.add(time.perf_counter(), len(event.token_ids))
                answer.text += event.text
                panels.add(index, event.text)
            else:
                answer.finish = event
                panels.end(index)


def _report(answers: Sequence[Answer]) -> str:
    """Return a line for each stream and one for all."""
    lines = [
        f"  {index}  {answer.times.summary()}  ({answer.finish.reason.value if answer.finish else 'open'})"
        for index, answer in enumerate(answers, 1)
    ]
    ttfts_ms = [answer.times.ttft_ms for answer in answers if answer.times.ttft_ms is not None]
    itls_ms = [itl_ms for answer in answers for itl_ms in answer.times.itl_ms]
    tokens = sum(answer.times.tokens for answer in answers)
    elapsed_s = max((answer.times.elapsed_s for answer in answers), default=0.0)
    lines.append(
        f"all  TTFT median {percentile(ttfts_ms, 50):.1f} ms, ITL {describe(itls_ms)}; "
        f"{tokens} tokens in {elapsed_s:.2f} s: {tokens / max(elapsed_s, 1e-9):.0f} tok/s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
