from __future__ import annotations

from typing import Any

import pytest

from proxy.observability.aggregate import (
    SUMMED,
    Family,
    added,
    most_used,
    pages_joined,
    pools_joined,
    statuses_joined,
    summed,
    usages_joined,
)

HITS = Family("hits", "Hits.", "counter", [("hits_total", (("model", "a"),), 3.0), ("hits_created", (), 20.0)])
MORE = Family("hits", "Hits.", "counter", [("hits_total", (("model", "b"),), 1.0), ("hits_created", (), 10.0)])
TIMES = Family("t", "Times.", "histogram", [("t_bucket", (("le", "1.0"),), 1.0), ("t_count", (), 2.0)])


def test_samples_with_equal_name_and_labels_are_added() -> None:
    (family,) = summed([[HITS], [MORE], [HITS]])
    assert {(name, labels): value for name, labels, value in family.samples} == {
        ("hits_total", (("model", "a"),)): 6.0,
        ("hits_total", (("model", "b"),)): 1.0,
        ("hits_created", ()): 10.0,
    }
    assert summed([[TIMES], [], [TIMES]])[0].samples == [("t_bucket", (("le", "1.0"),), 2.0), ("t_count", (), 4.0)]
    assert summed([[HITS, TIMES]]) == [HITS, TIMES]
    assert summed([]) == []


@pytest.mark.parametrize(
    ("name", "kind", "labelled"),
    [("x", "counter", False), ("x", "histogram", False), ("x", "gauge", True), ("x", "unknown", True)]
    + [(name, "gauge", False) for name in sorted(SUMMED)],
)
def test_gauges_that_cannot_be_summed_get_a_worker_label(name: str, kind: str, labelled: bool) -> None:
    family = Family(name, "", kind, [(name, (("state", "ready"),), 1.0)]).of_worker(2)
    expected = (("state", "ready"), ("worker", "2")) if labelled else (("state", "ready"),)
    assert family.samples == [(name, expected, 1.0)]


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (1, 2, 3),
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": 4}, {"a": 1, "b": {"c": 5}, "d": 4}),
        ("ok", "broken", "ok"),
        (True, True, True),
        (None, None, None),
    ],
)
def test_counts_are_added_at_any_depth(one: Any, other: Any, together: Any) -> None:
    assert added(one, other) == together


def row(state: str, states: list[dict[str, Any]], used: int) -> dict[str, Any]:
    limits = {"m": {"rpm": {"limit": 9, "used": used}}}
    return {"name": "k", "quota": "k", "state": state, "states": states, "limits": limits}


def test_key_has_the_worst_state_of_all_workers() -> None:
    short = {"model": "m", "state": "cooling", "until_s": 1.0}
    long = {"model": "m", "state": "cooling", "until_s": 9.0}
    whole = {"model": "*", "state": "rejected", "until_s": 5.0}
    shut, open_ = [{"name": "u", "state": state, "until_s": 0} for state in ("closed", "open")]
    pools: list[dict[str, Any]] = [
        {"keys": [row("ready", [short], 3)], "upstreams": [shut]},
        {"keys": [row("rejected", [long, whole], 2)], "upstreams": [open_]},
    ]
    for order in (pools, pools[::-1]):
        joined = pools_joined(order)
        (key,) = joined["keys"]
        assert key["state"] == "rejected"
        assert sorted(key["states"], key=lambda state: state["until_s"]) == [whole, long]
        assert key["limits"]["m"]["rpm"]["used"] == 3
        assert joined["upstreams"] == [open_]
    assert pools_joined(pools[:1]) == pools[0]


def test_use_of_a_limit_is_the_highest_reported() -> None:
    assert most_used({"rpm": {"used": 1}}, {"rpm": {"used": 2}, "tpm": {"used": 0}}) == {
        "rpm": {"used": 2},
        "tpm": {"used": 0},
    }


def state(number: int, requests: int, used: int, cache: dict[str, Any] | None) -> dict[str, Any]:
    client = {"requests": requests, "tokens": 10, "running": 1, "limits": {"rpm": {"limit": 5, "used": used}}}
    return {
        "worker": number,
        "pid": 100 + number,
        "uptime_s": float(number),
        "in_flight": 2,
        "queue": {"waiting": 1},
        "clients": {"anna": client},
        "cache": cache,
        "settings": {"x": 1},
    }


def test_statuses_are_added_except_shared_fields() -> None:
    cache = {"memory_entries": 1, "entries": 7, "hits": 2, "state": "ok"}
    joined = statuses_joined([state(2, 1, 3, cache), state(1, 4, 2, cache)], shared_store=True)
    assert (joined["worker"], joined["in_flight"], joined["queue"], joined["uptime_s"]) == (2, 4, {"waiting": 2}, 2.0)
    assert joined["clients"]["anna"]["requests"] == 5
    assert joined["clients"]["anna"]["limits"] == {"rpm": {"limit": 5, "used": 3}}
    assert joined["cache"] == {"memory_entries": 2, "entries": 7, "hits": 4, "state": "ok"}
    assert [one["worker"] for one in joined["workers"]] == [1, 2]
    assert joined["settings"] == {"x": 1}
    apart = statuses_joined([state(1, 0, 0, cache), state(2, 0, 0, cache)], shared_store=False)
    assert apart["cache"]["entries"] == 14
    assert statuses_joined([state(1, 0, 0, None), state(2, 0, 0, None)], shared_store=True)["cache"] is None


def listed(*names: str) -> list[dict[str, str]]:
    return [{"key": name, "form": "json"} for name in names]


def test_merged_page_ends_where_a_worker_has_more() -> None:
    pages = [{"entries": listed("a", "c", "e"), "next": "e\njson"}, {"entries": listed("b", "e", "g"), "next": ""}]
    assert pages_joined(pages) == {"entries": listed("a", "b", "c", "e"), "next": "e\njson"}
    assert pages_joined([{"entries": listed("b", "a"), "next": ""}] * 2) == {"entries": listed("a", "b"), "next": ""}


def usage(requests: int, hits: int, cost: str, lost: int) -> dict[str, Any]:
    total = {"requests": requests, "hits": hits, "hit_rate": 0.5, "cost_usd": cost, "saved_usd": "0.000001"}
    return {"since_start": total | {"p50_ms": None}, "ledger": {"path": "x", "state": "ok", "lost": lost}}


def test_usage_totals_of_workers_are_added_exactly() -> None:
    mine = usage(2, 1, "0.000000150", 1) | {"rows": [1]}
    joined = usages_joined(mine, [usage(1, 1, "2.250000", 0), usage(1, 1, "0.000000", 2)])
    assert joined["since_start"] == {
        "requests": 4,
        "hits": 3,
        "hit_rate": 0.75,
        "cost_usd": "2.25000015",
        "saved_usd": "0.000003",
        "p50_ms": None,
    }
    assert (joined["ledger"], joined["rows"]) == ({"path": "x", "state": "ok", "lost": 3}, [1])
    off = {"since_start": mine["since_start"], "ledger": None}
    assert usages_joined(off, [off])["ledger"] is None
