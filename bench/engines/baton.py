"""Baton, whole: scheduler, front-end and worker as processes, asked over one gRPC mux stream on this host."""

import asyncio
import tempfile
import time

from baton_client import AsyncClient, BatonError, Delta, Sampling, Stack, StackOptions
from bench.engines.interface import Options
from bench.workload import Request

_STEP_TOKENS = 16_384


class Baton:
    """Started twice: with nothing compiled, then with the kernels of the first start at hand."""

    def __init__(self, options: Options) -> None:
        self._kernels = tempfile.TemporaryDirectory(prefix="baton-kernels-")
        worker = ["--device", options.device, "--load-format", "dummy"]
        worker += ["--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)]
        worker += ["--max-num-batched-tokens", str(_STEP_TOKENS)]
        self._options = StackOptions(
            model=options.model,
            worker_args=worker,
            scheduler_args=("--max-queue", "4096"),
            environment={"TRITON_CACHE_DIR": self._kernels.name},
        )
        self.starts_s: dict[str, float] = {}
        for name in ("cold", "warm"):
            began = time.perf_counter()
            self._stack = Stack.start(self._options)
            self.starts_s[name] = time.perf_counter() - began
            if name == "cold":
                self._stack.stop(drain=False)

    def serve(self, requests: list[Request]) -> list[list[float]]:
        """See `Engine.serve`."""
        times = asyncio.run(_serve(self._stack.address, requests))
        self._stack.check()
        return times

    def close(self) -> None:
        """See `Engine.close`."""
        self._stack.stop(drain=False)
        self._kernels.cleanup()


async def _serve(address: str, requests: list[Request]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in requests]
    async with AsyncClient(address) as client:
        await client.model()
        async with client.mux() as mux:
            started = time.perf_counter()

            async def arrivals() -> None:
                for number, request in enumerate(requests):
                    wait_s = started + request.arrival_s - time.perf_counter()
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
                    sampling = Sampling(
                        temperature=request.temperature, max_tokens=request.max_tokens, ignore_eos=True
                    )
                    mux.start(number, request.token_ids, sampling)
                mux.done()

            sending = asyncio.create_task(arrivals())
            async for batch in mux:
                now = time.perf_counter() - started
                for number, event in batch:
                    if isinstance(event, BatonError):
                        raise event
                    if isinstance(event, Delta):
                        times[number] += [now] * len(event.token_ids)
            await sending
    return times


make = Baton
