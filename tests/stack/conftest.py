"""Fixtures of the whole stack's tests."""

from tests.support.stack import stack

__all__ = ["stack"]
