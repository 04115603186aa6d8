"""Traces of the device, asked for by a signal: what ran, when, over a number of steps.

SIGUSR1 starts one. Steps are slower while they are watched, and writing the file stops the worker for a
moment, so none is taken unless a folder for them is given.
"""

import logging
import signal
import time
from pathlib import Path
from types import FrameType

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)


class Tracer:
    """Writes `trace-N.json` (Chrome's format, times in microseconds) into `folder`; None: does nothing."""

    def __init__(self, folder: Path | None, steps: int) -> None:
        self._folder, self._steps = folder, steps
        self._asked = False
        self._left = self._count = 0
        self._profile: profile | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            signal.signal(signal.SIGUSR1, self._ask)

    def before_step(self) -> None:
        """To be called before each step is submitted."""
        if self._profile is not None:
            self._left -= 1
            if self._left <= 0:
                self._stop(self._profile)
        elif self._asked:
            self._asked = False
            self._start()

    def _ask(self, _: int, __: FrameType | None) -> None:
        self._asked = True

    def _start(self) -> None:
        cuda = torch.cuda.is_available()
        self._profile = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
        self._left = self._steps
        self._profile.start()

    def _stop(self, running: profile) -> None:
        assert self._folder is not None
        started = time.monotonic()
        running.stop()
        self._profile = None
        self._count += 1
        draft = self._folder / "draft.json"
        running.export_chrome_trace(str(draft))
        path = draft.replace(self._folder / f"trace-{self._count}.json")
        log.info("traced steps=%d file=%s seconds=%.1f", self._steps, path, time.monotonic() - started)
