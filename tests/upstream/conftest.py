"""The way up on real sockets, with little patience."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from proxy.upstream.client import AiohttpTransport


@pytest.fixture
async def up() -> AsyncIterator[AiohttpTransport]:
    transport = AiohttpTransport(connect=0.5, idle=0.2)
    yield transport
    await transport.close()
