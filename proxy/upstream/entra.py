"""Entra ID: an Azure upstream is called with tokens of the proxy's own identity, renewed ahead of time.

The identity is found as Microsoft's SDKs find it (`DefaultAzureCredential`: environment, workload identity, managed
identity, `az login`); the package comes with the extra `azure`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from ..system.clock import Clock

log = logging.getLogger("proxy")

SCOPE: Final = "https://cognitiveservices.azure.com/.default"
"""The scope of the tokens (Microsoft: *Azure OpenAI REST API reference*, Authentication)."""

AHEAD: Final = 300.0
"""A token is renewed this many seconds before its end, or after half of its time if that is later."""

SHORTEST: Final = 1.0
LONGEST: Final = 60.0
"""Seconds between two tries after a failure: at first, and at most."""

FIRST: Final = 15.0
"""Seconds that a start waits for the first token."""


class Token(Protocol):
    """A token of Entra ID. expires_on: Unix seconds."""

    @property
    def token(self) -> str: ...
    @property
    def expires_on(self) -> int: ...


class Identity(Protocol):
    """azure.identity's credentials, as far as they are used here."""

    async def get_token(self, *scopes: str) -> Token: ...
    async def close(self) -> None: ...


def default_identity() -> Identity:
    """Return the identity of this process. Raises ImportError without the extra `azure`."""
    from azure.identity.aio import DefaultAzureCredential

    identity: Identity = DefaultAzureCredential(exclude_interactive_browser_credential=True)
    return identity


class EntraTokens:
    """Keeps one token valid. put: is called with each new token."""

    def __init__(self, put: Callable[[str], None], clock: Clock, identity: Callable[[], Identity]) -> None:
        self._put = put
        self._clock = clock
        self._make = identity
        self._had = asyncio.Event()

    async def first(self) -> None:
        """Wait for the first token, at most `FIRST` seconds; requests fail until there is one."""
        try:
            await asyncio.wait_for(self._had.wait(), FIRST)
        except TimeoutError:
            log.error("no Entra ID token yet; its upstreams are called as soon as there is one")

    async def run(self) -> None:
        """Renew the token until cancelled. A failure is logged and tried again; the last token serves until its end."""
        pause = SHORTEST
        identity = self._make()
        try:
            while True:
                try:
                    token = await identity.get_token(SCOPE)
                except Exception as error:  # the library raises many kinds: none may end the renewal
                    log.warning("no Entra ID token: %s", str(error).splitlines()[0] if str(error) else repr(error))
                    await self._clock.sleep(pause)
                    pause = min(2 * pause, LONGEST)
                    continue
                pause = SHORTEST
                self._put(token.token)
                self._had.set()
                left = max(0.0, token.expires_on - self._clock.wall())
                await self._clock.sleep(max(SHORTEST, left - min(AHEAD, left / 2)))
        finally:
            await identity.close()
