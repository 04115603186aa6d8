"""The production scheduler over a CUDA runner in this process, several plans in flight."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np

from baton_wire.columns import TOKEN
from baton_wire.frontend import Submit
from baton_wire.plan import SAMPLING, Plan
from baton_wire.result import End, Result
from gpu_worker import build
from gpu_worker.config import parse
from gpu_worker.cuda.runner import CudaRunner
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence
from scheduler_svc.core.step import Limits
from tests.support.demo import DEMO_MODEL

IN_FLIGHT = 3


def make_runner(model=DEMO_MODEL, **options: object) -> CudaRunner:
    """A runner on the device; options are those of the command line, with underscores; True for a flag."""
    arguments = ["--model", str(model), "--device", "cuda"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [f"{flag}={value}"]
    config = parse(arguments)
    runner = build.make_runner(config, build.load_model(config))
    assert isinstance(runner, CudaRunner)
    return runner


@dataclass
class Request:
    """A prompt and what is to be generated; sampled with its own seed where there is a temperature."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    stop_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass
class Run:
    """Tokens by request, and what else happened."""

    tokens: list[list[int]]
    preemptions: int = 0
    cached: int = 0
    plans: list[bytes] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)


class Driver:
    """One scheduler over one runner; the prefix cache lives as long as it does."""

    def __init__(self, runner: CudaRunner) -> None:
        limits = runner.limits
        runner.reset()
        self.runner = runner
        self.scheduler = Scheduler(
            Limits(
                max_slots=limits.max_slots,
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                max_model_len=limits.max_model_len,
                max_tokens_per_step=limits.max_tokens_per_step,
                row_multiple=limits.row_multiple,
            )
        )
        self._owners = 0

    def run(self, requests: Many[Request], pause: Callable[[], None] = lambda: None) -> Run:
        """All requests to their ends. `pause` is called before each plan and each look for results."""
        first, sequences = self._owners, []
        for request in requests:
            sampling = np.array(
                (request.seed, request.temperature, request.top_p, 0, request.top_k), SAMPLING
            )
            prompt = np.array(request.prompt, TOKEN)
            submit = Submit(self._owners, prompt, request.max_tokens, 0, sampling, request.stop_ids)
            sequences.append(Sequence.of(self._owners, submit))
            self.scheduler.add(sequences[-1])
            self._owners += 1
        run = Run([[] for _ in requests])
        flying: deque[int] = deque()
        while self.scheduler.load or flying:
            while len(flying) < IN_FLIGHT and (plan := self.scheduler.schedule()) is not None:
                pause()
                run.plans.append(plan.encode())
                self.runner.submit(Plan.decode(run.plans[-1]))
                flying.append(plan.step)
            pause()
            for result in self.runner.finished():
                assert result.step == flying.popleft()
                run.results.append(result)
                outcome = self.scheduler.apply(result)
                for owner, token in zip(outcome.owners.tolist(), outcome.tokens.tolist(), strict=True):
                    run.tokens[owner - first].append(token)
                assert all(end is not End.NUMERICAL for _, end in outcome.ended)
        run.preemptions = sum(sequence.preemptions for sequence in sequences)
        run.cached = sum(max(0, sequence.cached) for sequence in sequences)
        return run
