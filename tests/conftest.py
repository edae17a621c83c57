"""What every module of tests must leave as it found it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_event_loop_is_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """`asyncio.run` refuses to work in a thread that has one: the module that leaves it fails, not the one after it."""
    yield
    left = asyncio._get_running_loop()
    if left is not None:
        pytest.fail(
            f"{request.node.nodeid} left an event loop running; close what opened it (a browser?) in its module"
        )
