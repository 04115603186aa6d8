"""The demo model that the repository holds."""

from pathlib import Path

import pytest

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Its checkpoint directory."""
    return DEMO_MODEL
