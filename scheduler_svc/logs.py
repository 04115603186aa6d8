"""Logging of the service's processes: lines on stderr, each naming its process. Never prompts or text."""

import logging
import sys

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str, process: str) -> None:
    """Sends this process's log to stderr from `level` (one of LEVELS) on."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s baton.{process}: %(message)s",
        force=True,
    )
