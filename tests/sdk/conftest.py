"""The SDKs, sync and async, and the two places they are pointed at: the scripted upstream and the demo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests import canned
from tests.launch import ProxyProcess, settings, write_config
from tests.ledger import Request
from tests.sdk.kit import KINDS, Job, Kind, Outcome, Sdk, start
from tests.upstream import Answer, ScriptedUpstream

FLAVOURS = [(kind, flavour) for kind in KINDS for flavour in ("sync", "async") if flavour == "async" or kind.language == "python"]


@dataclass(frozen=True, slots=True)
class Caller:
    """An SDK in front of one address."""

    sdk: Sdk
    asynchronous: bool
    address: str
    name: str
    """Unique to the test: put it into prompts, and into the names of models that get into trouble."""

    def at(self, address: str) -> Caller:
        return replace(self, address=address)

    def call(self, method: str, /, raw: bool = False, azure: bool = False, max_retries: int | None = None, **fields: Any) -> Outcome:
        return self.sdk.ask(Job(self.address, method, fields, raw, azure, self.asynchronous, max_retries))
