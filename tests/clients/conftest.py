"""A real stack with the demo model, started once per test process by those tests that ask for it."""

import pytest

from baton_client import Client, Stack, StackOptions
from tests.clients.command import DEMO_MODEL, THREADS


@pytest.fixture(scope="session")
def stack():
    with Stack.start(StackOptions(model=str(DEMO_MODEL), environment=THREADS)) as running:
        yield running


@pytest.fixture
def client(stack):
    with Client(stack.address) as client:
        yield client
