"""vLLM in this process, driven by its own engine loop; its package is found on PYTHONPATH."""

import importlib
import os
import time
from typing import Any

from bench.engines.interface import Options
from bench.workload import Request

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it would compile kernels for minutes
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class Vllm:
    """`starts_s` has one entry: its caches are left as they are found."""

    def __init__(self, options: Options) -> None:
        began = time.perf_counter()
        self._vllm = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            options.model,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            enable_prefix_caching=True,
            gpu_memory_utilization=0.9,
            load_format="dummy",
        )
        self.starts_s = {"cold": time.perf_counter() - began}
        self._next = 0

    def serve(self, requests: list[Request]) -> list[list[float]]:
        """See `Engine.serve`. Arrivals are looked at between steps, so one waits a step at most for that."""
        engine, kind = self._llm.llm_engine, self._output_kind(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
        times: list[list[float]] = [[] for _ in requests]
        numbers: dict[str, int] = {}
        started = time.perf_counter()
        while order or engine.has_unfinished_requests():
            now = time.perf_counter() - started
            while order and requests[order[0]].arrival_s <= now:
                number = order.pop(0)
                name = str(self._next)
                self._next += 1
                numbers[name] = number
                self._add(engine, name, requests[number], kind)
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, requests[order[0]].arrival_s - (time.perf_counter() - started)))
                continue
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                times[numbers[output.request_id]] += [now] * len(output.outputs[0].token_ids)
        return times

    def close(self) -> None:
        """See `Engine.close`: its processes end with this one."""

    def _output_kind(self, requests: list[Request]) -> Any:
        """Where all arrive at once only the ends count: as its offline interface, it then reports no step."""
        kinds = self._vllm.sampling_params.RequestOutputKind
        offline = all(request.arrival_s == 0 for request in requests)
        return kinds.FINAL_ONLY if offline else kinds.DELTA

    def _add(self, engine: Any, name: str, request: Request, kind: Any) -> None:
        params = self._vllm.SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=kind,
        )
        engine.add_request(name, {"prompt_token_ids": request.token_ids}, params)


make = Vllm
