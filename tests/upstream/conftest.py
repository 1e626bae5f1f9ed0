"""The way up on real sockets, with little patience."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from proxy.upstream.client import Upstreams


@pytest.fixture
async def up() -> AsyncIterator[Upstreams]:
    way_up = Upstreams(connect=0.5, idle=0.2)
    yield way_up
    await way_up.close()
