"""Changes of state of keys, breakers, stores, limiters, budgets and workers: each is counted and logged once."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

STATE_CHANGES: Final[Counter[tuple[str, str, str]]] = Counter()
"""How often each thing has come into each state: by kind, name and state."""


@dataclass(frozen=True, slots=True)
class Change:
    """A thing has come into another state.

    text: says so, and why. until: when the state ends, in Unix seconds. about: the part of the thing that has changed,
    such as the model of a key; it is no label. logger: the name of the log that gets the line.
    """

    kind: Literal["key", "breaker", "store", "limiter", "budget", "worker"]
    name: str
    state: str
    text: str
    level: int = logging.WARNING
    until: float | None = None
    about: str = ""
    logger: str = "proxy"


forward: Callable[[Change], None] | None = None
"""In a worker: sends a change to the supervisor, which logs once what several workers notice."""


def state_changed(change: Change, noticed_here: bool = True) -> None:
    """Count a change and log its line. noticed_here: False if another process has noticed and counted it."""
    if noticed_here:
        STATE_CHANGES[change.kind, change.name, change.state] += 1
    if forward is not None:
        forward(change)
    else:
        log_change(change)


def log_change(change: Change) -> None:
    """Log the line of a change. It repeats another one if thing and state are the same, whatever the text says."""
    fields = {"kind": change.kind, "name": change.name, "state": change.state}
    text = change.text
    if change.about:
        fields["about"] = change.about
    if change.until is not None:
        moment = time.localtime(change.until)
        fields["until"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", moment)
    repeats = " ".join(fields[name] for name in ("kind", "name", "state", "about") if name in fields)
    logging.getLogger(change.logger).log(change.level, "%s", text, extra={"fields": fields, "repeats": repeats})
