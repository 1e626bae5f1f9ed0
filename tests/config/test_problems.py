from __future__ import annotations

import pytest

from proxy.config.problems import (
    COMMAND_LINE,
    DEFAULT,
    ENVIRONMENT,
    Problem,
    SourceLocation,
    looks_secret,
    shown,
    shown_name,
)


@pytest.mark.parametrize(
    ("where", "label", "problem"),
    [
        (SourceLocation("a.yaml", 3), "a.yaml:3", "a.yaml:3: server.port: no"),
        (SourceLocation("a.yaml"), "a.yaml", "a.yaml: server.port: no"),
        (SourceLocation(ENVIRONMENT, via="PROXY__X"), "env PROXY__X", "environment: server.port (PROXY__X): no"),
        (SourceLocation(COMMAND_LINE, via="--port"), "flag --port", "command line: server.port (--port): no"),
        (DEFAULT, "default", "default: server.port: no"),
    ],
)
def test_places(where: SourceLocation, label: str, problem: str) -> None:
    assert where.label == label
    assert str(where.problem("server.port", "no")) == problem


def test_a_problem_of_the_whole_file() -> None:
    assert str(SourceLocation("a.yaml", 3).problem("", "no")) == "a.yaml:3: no"
    assert str(SourceLocation(ENVIRONMENT, via="X").problem("", "no")) == "environment: X: no"
    assert str(Problem("f", None, "", "m")) == "f: m"


@pytest.mark.parametrize(
    "text",
    [
        "sk-abc",
        "sk-proj-abc",
        "Bearer abc",
        "key=sk-abc",
        "eyJhbGciOi",
        "0123456789abcdef0123456789abcdef",
        "A1" * 42,
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_what_looks_like_a_key_is_not_shown(text: str) -> None:
    assert looks_secret(text)
    assert text not in shown(text)
    assert shown_name(text) == "(not shown)"


@pytest.mark.parametrize(
    "text", ["9000", "task-force", "gpt-4o-2024-08-06", "prompt_cache_retention", "https://a.b/v1", ""]
)
def test_what_does_not_is(text: str) -> None:
    assert shown(text) == repr(text)
    assert shown_name(text) == text


def test_long_and_unprintable_texts() -> None:
    assert len(shown("x-" * 100)) < 70
    assert shown_name("x-" * 100) == shown_name("a\nb") == "(not shown)"
    assert "\n" not in shown("a\nb")
