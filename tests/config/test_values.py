from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import values
from proxy.config.description import Leaf, optional
from proxy.config.values import duration, integer, number, size

LEAVES: list[tuple[Leaf[Any], dict[str, object], list[str]]] = [
    (
        integer(0, 65535),
        {"0": 0, "8484": 8484, "010": 10, "1e3": 1000, "1_000": 1000, "+5": 5, "5.0": 5},
        ["", "-1", "65536", "1.5", "1e999", "0x10", "٣", "1 0", "ten", "1e-1", "1__0"],
    ),
    (integer(), {"1e6": 10**6, "2_000_000": 2 * 10**6}, ["-1", "1e16"]),
    (values.SHARE, {"1": 1.0, "1.0": 1.0, "0.25": 0.25}, ["0", "1.01", "-1", "nan", "inf"]),
    (number(1.0), {"0": 0.0, "0.2": 0.2}, ["1.1", "-0.1"]),
    (values.MONEY, {"0": Decimal(0), "2.50": Decimal("2.5"), "1e-3": Decimal("0.001")}, ["-1", "1e10", "$2"]),
    (
        duration(),
        {"250ms": 0.25, "30s": 30.0, "5m": 300.0, "24h": 86400.0, "7d": 604800.0, "90": 90.0, "0.5": 0.5, "0s": 0.0},
        ["", "7 dayz", "-1s", "1w", "s", "1e3s", "٣s", "99999d", "1h30m"],
    ),
    (duration(0.001), {"1ms": 0.001}, ["0", "0s"]),
    (values.duration_or_auto(), {"auto": None, "1m": 60.0}, ["Auto", "never"]),
    (
        size(),
        {"64KiB": 65536, "256MiB": 2**28, "4GiB": 2**32, "1.5KiB": 1536, "1024": 1024, "0": 0, "8mib": 2**23, "5 B": 5},
        ["", "10MB", "64K", "-1", "1.5", "1e3", "9999999GiB"],
    ),
    (size(1), {"1": 1}, ["0"]),
    (
        values.BOOLEAN,
        {"true": True, "True": True, "yes": True, "on": True, "false": False, "no": False, "off": False},
        ["", "1", "0", "maybe", "y"],
    ),
    (values.choice("memory", "off"), {"memory": "memory", "off": "off"}, ["", "Off", "false", "redis"]),
    (
        values.NAME,
        {"openai-1": "openai-1", "a@b.c/d+e_": "a@b.c/d+e_"},
        ["", "a b", "sk-abc", "-a", "a:b", "é", "x" * 65],
    ),
    (values.SHA256, {"0A" * 32: b"\n" * 32}, ["", "0a" * 31, "zz" * 32]),
    (
        values.HOST,
        {"127.0.0.1": "127.0.0.1", "LocalHost": "localhost", "[::1]": "::1", "::": "::", "my_service": "my_service"},
        ["", "http://x", "a b", "*", "a..b", ":::", "host:80", "-x"],
    ),
    (
        values.ALLOWED_HOST,
        {"Proxy.Local": "proxy.local", "[::1]": "::1", "fe80::1": "fe80::1"},
        ["a:80", "https://a", "*"],
    ),
    (
        values.HOST_AND_PORT,
        {"0.0.0.0:9090": ("0.0.0.0", 9090), "[::1]:0": ("::1", 0)},
        ["9090", ":9090", "a:", "a:x", "a:65536", "::1:80"],
    ),
    (
        values.ORIGIN,
        {
            "https://App.example.com": "https://app.example.com",
            "http://[::1]:3000/": "http://[::1]:3000",
            "tauri://localhost": "tauri://localhost",
            "vscode-webview://*": "vscode-webview://*",
            "http://localhost:*": "http://localhost:*",
            "https://*.example.com": "https://*.example.com",
            "null": "null",
        },
        ["*", "*://a", "http*://a", "https://a/b", "https://a/*", "app.example.com", "https://u@a", "https://a:*0"],
    ),
    (values.PATH, {"~/x y": "~/x y"}, [" ", "a\0b"]),
    (values.SOCKET_PATH, {"/run/p.sock": "/run/p.sock"}, ["/" + "x" * 103]),
    (values.FIELD, {"user": "user"}, ["a.b", ""]),
]


@pytest.mark.parametrize(("leaf", "text", "value"), [(leaf, t, v) for leaf, good, _ in LEAVES for t, v in good.items()])
def test_texts_become_values(leaf: Leaf[object], text: str, value: object) -> None:
    assert leaf.convert(text) == value


@pytest.mark.parametrize(("leaf", "text"), [(leaf, text) for leaf, _, bad in LEAVES for text in bad])
def test_other_texts_are_refused(leaf: Leaf[object], text: str) -> None:
    with pytest.raises(ValueError):
        leaf.convert(text)


@pytest.mark.parametrize(
    ("leaf", "value", "text"),
    [
        (duration(), 0.25, "250ms"),
        (duration(), 0.0, "0s"),
        (duration(), 1.5, "1.5s"),
        (duration(), 86400.0, "24h"),
        (duration(), 172800.0, "2d"),
        (duration(), 90.0, "90s"),
        (values.duration_or_auto(), None, "auto"),
        (values.duration_or_auto(), 60.0, "1m"),
        (size(), 2**28, "256MiB"),
        (size(), 1000, "1000"),
        (size(), 0, "0"),
        (values.BOOLEAN, False, "false"),
        (values.MONEY, Decimal("0.0000001"), "0.0000001"),
        (values.HOST_AND_PORT, ("::1", 90), "[::1]:90"),
        (optional(size()), None, ""),
        (optional(size()), 1024, "1KiB"),
    ],
)
def test_values_are_shown_as_people_write_them(leaf: Leaf[object], value: object, text: str) -> None:
    assert leaf.show(value) == text


@given(st.integers(0, 2**50))
def test_a_shown_size_reads_back(value: int) -> None:
    assert size().convert(size().show(value)) == value


@given(st.integers(0, 3650 * 86400).map(float) | st.integers(0, 999).map(lambda ms: ms / 1000))
def test_a_shown_duration_reads_back(value: float) -> None:
    assert duration().convert(duration().show(value)) == pytest.approx(value)


@given(st.text(max_size=50))
def test_no_text_breaks_a_converter(text: str) -> None:
    for leaf, _, _ in LEAVES:
        try:
            leaf.convert(text)
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("localhost.", True),
        ("a.localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("notlocalhost", False),
        ("host.docker.internal", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert values.is_loopback(host) is loopback
