from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.problems import ENVIRONMENT, Problem, SourceLocation
from proxy.config.tree import Listing, Node, Scalar, Table, parse

FILE = SourceLocation("a.yaml")


def parsed(text: str) -> tuple[Node | None, list[str]]:
    problems: list[Problem] = []
    return parse(text, FILE, problems), [str(problem) for problem in problems]


def simple(node: Node | None) -> object:
    if isinstance(node, Table):
        return {name: simple(child) for name, child in node.entries}
    if isinstance(node, Listing):
        return [simple(item) for item in node.items]
    return None if node is None or node.null else node.text


def test_scalars_are_taken_as_written() -> None:
    node, problems = parsed("a: off\nb: 2024-10-21\nc: 010\nd: 1e6\ne: on\nf: 'null'\ng: null\nh:\ni: ~\nj: 1_0:30\n")
    assert problems == []
    assert simple(node) == {
        "a": "off", "b": "2024-10-21", "c": "010", "d": "1e6", "e": "on", "f": "null", "g": None, "h": None, "i": None,
        "j": "1_0:30",
    }  # fmt: skip


def test_lines() -> None:
    node, _ = parsed("# comment\na:\n  - x\n  - b: y\n\n    c:\n      d: z\n")
    assert isinstance(node, Table)
    listing = node.get("a")
    assert isinstance(listing, Listing)
    assert listing.where.line == 2  # that of its name
    assert [item.where.line for item in listing.items] == [3, 4]
    inner = listing.items[1]
    assert isinstance(inner, Table)
    assert [child.where.line for _, child in inner.entries] == [4, 6]
    assert inner.get("nothing") is None


def test_an_environment_value_has_no_line() -> None:
    problems: list[Problem] = []
    node = parse("a: b", SourceLocation(ENVIRONMENT, via="X"), problems, "server")
    assert isinstance(node, Table)
    assert node.entries[0][1].where == SourceLocation(ENVIRONMENT, via="X")
    assert parse("a: [", SourceLocation(ENVIRONMENT, via="X"), problems, "server") is None
    assert str(problems[0]).startswith("environment: server (X): expected YAML")


def test_anchors_are_followed() -> None:
    assert simple(parsed("a: &x {b: 1}\nc: *x")[0]) == {"a": {"b": "1"}, "c": {"b": "1"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "a.yaml:3: a: expected each name once, found a duplicate key (first in line 1)"),
        ("a:\n  b: 1\n  b: 1", "a.yaml:3: a.b: expected each name once"),
        ("a: [1, 2", "a.yaml:1: expected YAML"),
        ("a: 1\n b: 2", "a.yaml:2: expected YAML, found a mistake: mapping values are not allowed here"),
        ("a:\n\t- b", "a.yaml:2: expected YAML"),
        ("a: [${X}]", "needs quotes"),
        ("a: {*: b}", "needs quotes"),
        ("a: @b", "needs quotes"),
        ("a: \x07", "a.yaml:1: expected YAML, found the character U+0007"),
        ("a: 1\n---\nb: 1", "a.yaml:2: expected YAML, found a mistake: expected a single document"),
        ("? [a]\n: b", "a.yaml:1: expected a name, found a list or a table"),
        ("a: !Ref b", "a.yaml:1: a: expected a plain value, found a YAML tag"),
        ("{" * 5000, "expected at most"),
        ("- " * 50, "expected at most"),
        ("a: &a [*a]", "expected at most"),
        ("a: &a {b: *a}", "expected at most"),
    ],
)
def test_mistakes(text: str, expected: str) -> None:
    _, problems = parsed(text)
    assert len(problems) == 1
    assert expected in problems[0]


def test_a_mistake_does_not_repeat_what_may_be_a_secret() -> None:
    for text in ("admin_key: *hunter2", "a: &hunter2 b\nc: &hunter2 d", "a: !hunter2!x y"):
        assert "hunter2" not in "".join(parsed(text)[1])


def test_few_lines_do_not_become_millions() -> None:
    names = "abcdefghijkl"
    lines = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise(names)]
    start = time.monotonic()
    _, problems = parsed("\n".join(["a: &a [x, x, x]", *lines]))
    assert "expected at most" in problems[0]
    assert time.monotonic() - start < 5


@given(st.text(alphabet=st.sampled_from("ab:-?[]{},&*!|>'\"%@`#\n \t${}~\\0"), max_size=60) | st.text(max_size=60))
def test_any_text_is_a_tree_or_a_problem(text: str) -> None:
    node, problems = parsed(text)
    assert node is not None or problems


def test_tables_change_by_copy() -> None:
    table = Table((("a", Scalar("1", FILE)),), FILE)
    assert simple(table.replaced("a", Scalar("2", FILE)).replaced("b", Scalar("3", FILE))) == {"a": "2", "b": "3"}
    assert simple(table.without("a")) == {}
    assert simple(table) == {"a": "1"}
