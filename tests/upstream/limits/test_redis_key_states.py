"""What another process wrote of a key's state is taken over, or left alone if it is not ours."""

from __future__ import annotations

from typing import Any, cast

import pytest

from proxy.system.redis import RedisConnection
from proxy.upstream.limits.redis_key_states import RedisKeyStates


def states(found: list[tuple[Any, ...]]) -> RedisKeyStates:
    made = RedisKeyStates(cast("RedisConnection", None), cast("Any", None), "p", lambda: 0)
    made.adopt = lambda *state: found.append(state)
    return made


@pytest.mark.parametrize(
    "value",
    [
        b"\xff\x00",
        b"not json",
        b"17",
        b"[]",
        b"{}",
        b'{"status": "asleep", "until": 5.0, "reason": ""}',
        b'{"status": "cooling", "until": "soon", "reason": ""}',
        b'{"status": "cooling", "until": 5.0}',
        b'{"status": "ready", "until": 5.0, "reason": null}',
        17,
        ["cooling"],
    ],
)
def test_a_foreign_value_is_left_alone(value: Any) -> None:
    found: list[tuple[Any, ...]] = []
    assert not states(found).apply("k1", "m", [value, b"", value, None], 0.0)  # type: ignore[list-item]
    assert found == []


def test_a_state_of_ours_is_taken_over_once() -> None:
    found: list[tuple[Any, ...]] = []
    made = states(found)
    value = b'{"status": "cooling", "until": 5000.0, "reason": "429"}'
    assert made.apply("k1", "m", [b"", b"", value, b""], 1000.0)
    assert not made.apply("k1", "m", [b"", b"", value, b""], 2000.0)
    assert found == [("k1", "m", "cooling", 4.0, "429")]
