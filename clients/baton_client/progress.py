"""The progress bar of `LLM.generate`: finished prompts, with prefill and decode tokens per second so far."""

import time
import warnings
from types import TracebackType
from typing import Self


class ProgressBar:
    """Counts tokens and shows them. Without tqdm, or with `show` false, it only counts."""

    def __init__(self, total: int, *, show: bool) -> None:
        self._bar = None
        if show:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                warnings.warn(
                    "no progress bar without tqdm: pip install 'baton-serve[client]' or pass use_tqdm=False",
                    stacklevel=4,
                )
            else:
                self._bar = tqdm(total=total, desc="Generating", dynamic_ncols=True, unit="prompt")
        self._started = time.perf_counter()
        self._prefill_s = 1e-9  # until the last prompt was prefilled, from when on the rate stands
        self.prefilled = 0
        self.decoded = 0

    def advance(self, *, prefilled: int = 0, decoded: int = 0, finished: int = 0) -> None:
        """Count tokens and finished prompts."""
        self.prefilled += prefilled
        self.decoded += decoded
        if self._bar is None:
            return
        elapsed_s = max(time.perf_counter() - self._started, 1e-9)
        if prefilled:
            self._prefill_s = elapsed_s
        self._bar.set_postfix(
            {
                "Prefill": f"{self.prefilled / self._prefill_s:.0f}tok/s",
                "Decode": f"{self.decoded / elapsed_s:.0f}tok/s",
            },
            refresh=False,
        )
        self._bar.update(finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
