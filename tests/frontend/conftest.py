"""Fixtures of the front-end's tests."""

from tests.support.demo import demo_model

__all__ = ["demo_model"]
