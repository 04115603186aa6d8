"""What a person is told about an error: one line, with what helps."""

import argparse

from baton_client.errors import BatonError, DeadlineError, UnavailableError


def explain(error: BatonError, arguments: argparse.Namespace) -> str:
    """Return what to tell the user about `error`."""
    if isinstance(error, UnavailableError) and error.code is not None and not error.reason:
        return f"nobody answers at {arguments.address}; 'baton up' starts a stack ({error.message})"
    if isinstance(error, DeadlineError) and arguments.timeout is not None:
        return f"not done after {arguments.timeout:g} s (--timeout)"
    retry = "" if error.retry_after_s is None else f" (try again in {error.retry_after_s:g} s)"
    return f"{error.message}{retry}"
