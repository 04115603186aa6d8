"""nano-vLLM's offline face: `LLM` generates for lists of prompts, over a private stack or a running server.

    llm = LLM("~/models/Qwen3-0.6B", max_model_len=4096)
    print(llm.generate(["Hello"], SamplingParams(temperature=0.6, max_tokens=64))[0]["text"])

Scripts written for nano-vLLM run with the import changed. Differences: `text` omits special tokens
(nano-vLLM's keeps them, the end token for one), unknown arguments are refused instead of ignored, and
temperature 0 is allowed.
"""

import atexit
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

from baton_client.client import Client
from baton_client.errors import BatonError, InvalidArgumentError
from baton_client.progress import ProgressBar
from baton_client.pump import Progress, RequestPump
from baton_client.sampling import Sampling, SamplingParams
from baton_client.stack import Stack, StackOptions

_MAX_IN_FLIGHT = 512  # half of the queue of a server with default limits
_ABSENT_S = 3.0  # two attempts more after a connection that was refused
_DEFAULTS = SamplingParams()


class Output(TypedDict):
    """One answer. `token_ids` include the stop token; `text` omits special tokens and the matched stop."""

    text: str
    token_ids: list[int]


class LLM:
    """A model for offline use; stops its private stack on `exit`, at the end of its `with` or of the process.

    model: a checkpoint folder in Hugging Face's layout, or a hub id. The other arguments are nano-vLLM's:
    limits in tokens, sequences and blocks; `num_kvcache_blocks` -1 takes what fits; `max_model_len` is capped
    by the model's own. Besides, options of the worker (`load_format` "dummy": random weights, for
    measurements; `deterministic`: a request's tokens do not depend on what runs beside it), and how long it
    may take to start. Raises StackError if the stack cannot start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_num_batched_tokens: int = 16384,
        max_num_seqs: int = 512,
        max_model_len: int = 4096,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        deterministic: bool = False,
        kvcache_block_size: int = 256,
        num_kvcache_blocks: int = -1,
        device: str = "auto",
        dtype: str = "auto",
        load_format: str = "auto",
        attention_backend: str = "auto",
        startup_timeout_s: float = 600.0,
    ) -> None:
        path = Path(model).expanduser()
        worker_args = [
            *("--max-num-batched-tokens", str(max_num_batched_tokens)),
            *("--max-num-seqs", str(max_num_seqs)),
            *("--max-model-len", str(min(max_model_len, _position_limit(path)))),
            *("--gpu-memory-utilization", str(gpu_memory_utilization)),
            *("--tensor-parallel-size", str(tensor_parallel_size)),
            *("--kvcache-block-size", str(kvcache_block_size)),
            *("--device", device),
            *("--dtype", dtype),
            *("--load-format", load_format),
            *("--attention-backend", attention_backend),
        ]
        if num_kvcache_blocks != -1:
            worker_args += ["--num-kvcache-blocks", str(num_kvcache_blocks)]
        flags = {"--enforce-eager": enforce_eager, "--deterministic": deterministic}
        worker_args += [flag for flag, given in flags.items() if given]
        options = StackOptions(
            model=str(path) if path.exists() else str(model),
            worker_args=worker_args,
            scheduler_args=("--max-queue", str(4 * _MAX_IN_FLIGHT)),
            ready_timeout_s=startup_timeout_s,
        )
        self._attach(Stack.start(options), "")

    @classmethod
    def connect(cls, address: str, *, timeout_s: float | None = None) -> Self:
        """Use the server at "host:port", no private stack. Raises UnavailableError if it is not ready.

        timeout_s: how long it may take to start; None: 60 s, or 3 s where the address refuses.
        """
        with Client(address) as client:
            if timeout_s is None:
                client.wait_ready(absent_s=_ABSENT_S)
            else:
                client.wait_ready(timeout_s)
        llm = cls.__new__(cls)
        llm._attach(None, address)
        return llm

    def _attach(self, stack: Stack | None, address: str) -> None:
        self._stack = stack
        self._pump = RequestPump(stack.address if stack else address, _MAX_IN_FLIGHT)
        self._next = 0
        self._running: dict[int, tuple[list[str], list[int]]] = {}
        self._held: Progress | None = None
        self._closed = False
        atexit.register(self.exit)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling_params: Sampling | Sequence[Sampling] = _DEFAULTS,
        use_tqdm: bool = True,
    ) -> list[Output]:
        """Answer every prompt, text or token ids; return the outputs in the order of the prompts.

        sampling_params: one for all, or one for each. The first request that fails cancels the others and is
        raised.
        """
        params = _spread(prompts, sampling_params)
        if self._running:
            raise BatonError("requests given to add_request are still running: step them to their end first")
        outputs: dict[int, Output] = {}
        with ProgressBar(len(prompts), show=use_tqdm) as bar:
            first = self._next
            try:
                for prompt, one in zip(prompts, params, strict=True):
                    self.add_request(prompt, one)
                while self._running:
                    progress = self._pump.wait()
                    done = self._take(progress, outputs)
                    bar.advance(
                        prefilled=progress.prefilled, decoded=len(progress.token_ids), finished=int(done)
                    )
            except BaseException:
                self._abandon()
                raise
        return [outputs[first + index] for index in range(len(prompts))]

    def add_request(self, prompt: str | Sequence[int], sampling_params: Sampling = _DEFAULTS) -> int:
        """Start a request, to be driven by `step`; return its number, with which `step` reports its end."""
        if self._closed:
            raise BatonError("this LLM has exited")
        given = _given(prompt)
        number = self._next
        self._next += 1
        self._running[number] = ([], [])
        self._pump.submit(number, given, sampling_params)
        return number

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Wait for progress; return the requests that ended, as (number, token ids), and a count of tokens.

        The count is nano-vLLM's: prompt tokens if positive (their prefill is done), tokens generated if
        negative. The server decides what runs in a step; here one ends when no further progress has come in.
        """
        if not self._running:
            return [], 0
        outputs: dict[int, Output] = {}
        count = 0
        progress: Progress | None = self._held or self._pump.wait()
        self._held = None
        while progress is not None:
            if progress.prefilled:
                if count < 0:  # prefill is counted by a step of its own
                    self._held = progress
                    break
                count += progress.prefilled
            elif progress.token_ids:
                if count > 0:
                    self._held = progress
                    break
                count -= len(progress.token_ids)
            self._take(progress, outputs)
            progress = self._pump.poll()
        return [(number, output["token_ids"]) for number, output in outputs.items()], count

    def is_finished(self) -> bool:
        """Whether every request has ended."""
        return not self._running

    def exit(self) -> None:
        """Cancel what runs, close the connection and stop the private stack; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.exit)
        self._pump.close()
        if self._stack is not None:
            self._stack.stop(drain=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()

    def _take(self, progress: Progress, outputs: dict[int, Output]) -> bool:
        """Book one progress; whether it ended its request. Raises what ended it badly."""
        if progress.error is not None:
            del self._running[progress.number]
            if self._stack is not None:
                self._stack.check()  # the deeper reason, if a part of the stack died
            raise progress.error
        texts, token_ids = self._running[progress.number]
        texts.append(progress.text)
        token_ids.extend(progress.token_ids)
        if progress.finish is None:
            return False
        del self._running[progress.number]
        outputs[progress.number] = Output(text="".join(texts), token_ids=token_ids)
        return True

    def _abandon(self) -> None:
        """Cancel and forget every request."""
        self._pump.cancel()
        self._running.clear()
        self._held = None


def _given(prompt: Any) -> str | list[int]:
    """A text or token ids, of whatever kind of row. Raises InvalidArgumentError for anything else."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, bytes):
        with contextlib.suppress(TypeError):
            return list(prompt)
    kind = type(prompt).__name__
    raise InvalidArgumentError(
        f"prompt: a text or a list of token ids is expected, not {kind}", field="prompt"
    )


def _spread(prompts: Any, sampling_params: Any) -> Sequence[Sampling]:
    """Return the parameters of each prompt. Raises InvalidArgumentError naming what does not fit."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidArgumentError(
            f"prompts: a list of texts or of token id lists is expected, not {type(prompts).__name__}",
            field="prompts",
        )
    if isinstance(sampling_params, Sampling):
        return [sampling_params] * len(prompts)
    if not isinstance(sampling_params, Sequence) or len(sampling_params) != len(prompts):
        raise InvalidArgumentError(
            f"sampling_params: one, or one for each of the {len(prompts)} prompts is expected",
            field="sampling_params",
        )
    return sampling_params


def _position_limit(model: Path) -> int:
    """Return the model's own limit on a sequence, in tokens; a huge one where the folder does not say."""
    try:
        limit = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError):
        return 2**31 - 1
    return limit if isinstance(limit, int) else 2**31 - 1
