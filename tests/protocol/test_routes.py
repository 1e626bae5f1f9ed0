"""Raw request targets and their routes."""

from __future__ import annotations

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.errors import ProxyError
from proxy.protocol.options import NO_OPTIONS, Options
from proxy.protocol.routes import ENDPOINTS, SEGMENTS, Route, parse_target, printable, unknown_route

PATHS = {
    "/chat/completions": "chat",
    "/embeddings": "embeddings",
    "/completions": "completions",
    "/responses": "responses",
    "/moderations": "moderations",
}


@pytest.mark.parametrize(("path", "endpoint"), PATHS.items())
@pytest.mark.parametrize("query", ["", "a=1&b=2", "x=../..//%2e%2f\\"])
def test_the_five_endpoints_in_every_shape(path: str, endpoint: str, query: str) -> None:
    tail = f"?{query}" if query else ""
    assert ENDPOINTS[path] == endpoint
    for prefix in ("/v1", ""):
        assert parse_target(prefix + path + tail) == Route("endpoint", path, query, endpoint)
    assert parse_target(f"/openai/v1{path}{tail}") == Route("endpoint", path, query, endpoint, "azure-v1")
    assert parse_target(f"/openai{path}{tail}") == Route("endpoint", path, query, endpoint, "azure")
    assert parse_target(f"/openai/deployments/my-gpt4o{path}{tail}") == Route(
        "endpoint", path, query, endpoint, "azure", "my-gpt4o"
    )


def test_an_empty_query_is_none() -> None:
    assert parse_target("/v1/models?").query == ""
    assert parse_target("/v1/models?a?b").query == "a?b"


PASSED = ["/models", "/models/gpt-4o", "/files", "/files/file-1/content", "/images/generations", "/audio/speech"]
PASSED += ["/batches", "/fine_tuning/jobs", "/uploads/u1/parts", "/vector_stores", "/assistants", "/threads/t/runs"]
PASSED += ["/responses/resp_1", "/chat/completions/c1/messages", "/conversations"]


@pytest.mark.parametrize("path", PASSED)
def test_what_is_passed_through(path: str) -> None:
    for prefix, shape in (("/v1", "openai"), ("", "openai"), ("/openai", "azure"), ("/openai/v1", "azure-v1")):
        route = parse_target(prefix + path)
        assert (route.kind, route.path, route.endpoint, route.shape) == ("passthrough", path, "", shape)


def test_any_path_below_v1_is_passed_through() -> None:
    assert parse_target("/v1/something/new").path == "/something/new"
    assert parse_target("/v1/v1/models").path == "/v1/models"
    assert parse_target("/openai/v1/something/new").path == "/something/new"
    assert parse_target("/openai/deployments/d/something/new").path == "/something/new"


@pytest.mark.parametrize("segment", sorted(SEGMENTS))
def test_without_v1_the_segments_of_the_api(segment: str) -> None:
    assert parse_target(f"/{segment}").path == f"/{segment}"
    assert parse_target(f"/{segment}/x").path == f"/{segment}/x"
    for near in (segment[:-1], f"{segment}x", segment.upper(), f"x/{segment}", f"%20{segment}"):
        with pytest.raises(ProxyError, match="no such route"):
            parse_target(f"/{near}-/y")


def test_the_documented_segments() -> None:
    assert {"chat", "completions", "embeddings", "models", "files", "images", "audio", "batches"} <= SEGMENTS
    assert {"fine_tuning", "uploads", "vector_stores", "assistants", "responses", "moderations"} <= SEGMENTS


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/metrics", "/healthz?x=1", "/_proxy/status", "/_proxy/"])
def test_our_own_routes(target: str) -> None:
    path, _, query = target.partition("?")
    assert parse_target(target) == Route("own", path, query)


UNKNOWN = ["/", "/v1", "/v1/", "/V1/models", "/v2/models", "/favicon.ico", "/index.html", "/healthz/", "/healthz/x"]
UNKNOWN += ["/_proxy", "/_proxyx/status", "/metricsx", "/openai", "/openai/", "/openai/v1", "/openai/v1/", "/openai/x"]
UNKNOWN += [
    "/openai/deployments",
    "/openai/deployments/",
    "/openai/deployments/d",
    "/openai/deployments/d/",
    "/_",
    "/_/",
]
UNKNOWN += ["/_/ttl=1h", "/_/ttl=1h/", "/_/ttl=1h/healthz", "/_/ttl=1h/_/ttl=2h/v1/models", "/_/ttl=1h/_proxy/status"]
UNKNOWN += [
    "",
    "v1/models",
    "*",
    "evil.example:443",
    "http://api.openai.com/v1/models",
    "https://x/v1/models",
    "?x=/v1",
]
UNKNOWN += [f"/openai/deployments/{'d' * 300}/chat/completions"]


@pytest.mark.parametrize("target", UNKNOWN)
def test_unknown_routes(target: str) -> None:
    with pytest.raises(ProxyError) as caught:
        parse_target(target)
    assert (caught.value.code, caught.value.status) == ("unknown_route", 404)


OTHER_SPELLINGS = [
    ("/v1/chat/completions/", "/v1/chat/completions"),
    ("/v1/chat/%63ompletions", "/v1/chat/completions"),
    ("/chat/completion%73/", "/chat/completions"),
    ("/v1/chat/completions;x=1", "/v1/chat/completions"),
    ("/v1/chat;a/completions", "/v1/chat/completions"),
    ("/v1/Chat/Completions", "/v1/chat/completions"),
    ("/v1/EMBEDDINGS", "/v1/embeddings"),
    ("/v1/Images/generations", "/v1/images/generations"),
    ("/v1/fine%5Ftuning/jobs", "/v1/fine_tuning/jobs"),
    ("/v1/models/", "/v1/models"),
    ("/v1/files/file%2D1", "/v1/files/file-1"),
    ("/openai/v1/responses/", "/openai/v1/responses"),
    ("/openai/deployments/%70tu/chat/completions", "/openai/deployments/ptu/chat/completions"),
    ("/openai/deployments/ptu;v=1/chat/completions", "/openai/deployments/ptu/chat/completions"),
    ("/openai/deployments/ptu/chat/completions/", "/openai/deployments/ptu/chat/completions"),
    ("/_/namespace=a;ttl=1h/v1/chat/completions/", "/v1/chat/completions"),
]


@pytest.mark.parametrize(("target", "right"), OTHER_SPELLINGS)
def test_another_spelling_of_a_route_is_refused_and_the_right_one_named(target: str, right: str) -> None:
    with pytest.raises(ProxyError) as caught:
        parse_target(f"{target}?a=%63;d")
    assert caught.value.code == "unknown_route"
    assert json.loads(caught.value.body())["error"]["message"].endswith(f"did you mean {right}?")


def test_options_in_the_base_url_may_be_encoded_and_the_query_is_free() -> None:
    assert parse_target("/_/tag=team:%73earch;ttl=1h/v1/models").options.tags == ("team:search",)
    assert parse_target("/v1/models?a=%63;d/").query == "a=%63;d/"


# --- raw paths --------------------------------------------------------------------------------------------------------

EVIL = ["..", "%2e", "%2E", "%2f", "%2F", "%5c", "%5C", "\\", "/"]
EVIL += ["%2e%2e", "%2E%2e", ".%2e", "%2e.", "..;", "a..b", "../..", "..%2f"]
ODD = ["\x00", "\t", " ", "\r\n", "\x7f", "#", "\udcff"]


@pytest.mark.parametrize("evil", EVIL + ODD)
@pytest.mark.parametrize(
    "template",
    [
        "/v1/{}/models",
        "/v1/files/{}",
        "/{}/v1/models",
        "/openai/deployments/{}/chat/completions",
        "/_/ttl=1h/{}/v1/files",
    ],
)
def test_a_path_with_parent_segments_is_refused(template: str, evil: str) -> None:
    for target in (template.format(evil), template.format(evil) + "?api-version=1"):
        if evil == "/" and not target.count("//"):
            continue
        with pytest.raises(ProxyError) as caught:
            parse_target(target)
        assert 400 <= caught.value.status < 500
        assert json.loads(caught.value.body())["error"]["code"] == caught.value.code


@pytest.mark.parametrize("target", ["/v1/.", "/v1/./models", "/v1/models/.", "/./v1/models", "/v1/models/..", "/.."])
def test_dot_segments_are_refused(target: str) -> None:
    with pytest.raises(ProxyError):
        parse_target(target)


KEPT = ["/v1/files/a.b", "/v1/files/.hidden", "/v1/files/a%20b", "/v1/models/ft:gpt-4o:org::id", "/v1/files/%E2%82%AC"]
KEPT += ["/v1/files/a%252fb", "/v1/files/a%3bb", "/v1/files/a%23b", "/v1/files/a+b@c", "/v1/files/é"]


@pytest.mark.parametrize("target", KEPT)
def test_other_paths_are_not_changed(target: str) -> None:
    assert parse_target(target).path == target.removeprefix("/v1")


@given(st.text(st.sampled_from("/.%25eEfFcC\\;av1#? ")).map(lambda text: "/v1/" + text))
def test_accepted_paths_have_no_parent_segments(target: str) -> None:
    try:
        route = parse_target(target)
    except ProxyError:
        return
    lowered = route.path.lower()
    for forbidden in ("..", "//", "\\", "%2e", "%2f", "%5c", "#", " ", "?"):
        assert forbidden not in lowered
    assert route.path.startswith("/")
    assert "." not in route.path.split("/")


def code_of(target: str) -> str:
    """The code that the client sees, '' where there is such a route."""
    try:
        parse_target(target)
    except ProxyError as refusal:
        code: str = json.loads(refusal.body())["error"]["code"]
        return code
    return ""


ANY = st.text() | st.text(st.sampled_from("/_;=a\udcff\ud800%#"))
"""Bytes of a target that are no UTF-8 come as surrogates."""


@given(ANY)
def test_any_target_is_accepted_or_an_error(text: str) -> None:
    for target in (text, "/" + text, "/_/" + text, "/openai/deployments/" + text):
        assert code_of(target) in ("", "unknown_route", "invalid_option", "bad_request")


# --- options, deployments, state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["/v1/models", "/openai/v1/models", "/openai/models", "/models"])
def test_options_before_any_shape(below: str) -> None:
    plain, with_options = parse_target(below), parse_target(f"/_/namespace=ci;ttl=1h;tag=team:search{below}")
    assert plain.options is NO_OPTIONS
    assert with_options.options == Options(namespace="ci", ttl=3600.0, tags=("team:search",))
    assert (with_options.path, with_options.shape, with_options.kind) == (plain.path, plain.shape, plain.kind)


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ProxyError) as caught:
        parse_target("/_/ttl=soon/v1/chat/completions")
    assert (caught.value.code, caught.value.status, caught.value.param) == ("invalid_option", 400, "ttl")


@pytest.mark.parametrize(
    ("written", "deployment"),
    [("gpt-4o", "gpt-4o"), ("gpt%204o", "gpt 4o"), ("a%3Ab", "a:b"), ("a%253Ab", "a%3Ab"), ("%E2%82%AC", "€")],
)
def test_a_deployment_is_decoded_once(written: str, deployment: str) -> None:
    assert parse_target(f"/openai/deployments/{written}/embeddings").deployment == deployment


@pytest.mark.parametrize(
    ("target", "stateful"),
    [
        ("/v1/files", True),
        ("/v1/batches/b1", True),
        ("/v1/threads/t", True),
        ("/v1/responses/resp_1", True),
        ("/v1/chat/completions/c1", True),
        ("/v1/vector_stores", True),
        ("/v1/something/new", True),
        ("/openai/files?api-version=1", True),
        ("/v1/models", False),
        ("/v1/models/gpt-4o", False),
        ("/v1/audio/speech", False),
        ("/v1/images/generations", False),
        ("/healthz", False),
        ("/v1/chat/completions", True),  # GET lists the stored ones
    ],
)
def test_which_routes_keep_to_one_key(target: str, stateful: bool) -> None:
    assert parse_target(target).stateful is stateful


def test_segment_is_the_first_of_the_path() -> None:
    for prefix, path in product(("/v1", "", "/openai/v1"), ("/files", "/files/f1/content")):
        assert parse_target(prefix + path).segment == "files"


# --- in messages ------------------------------------------------------------------------------------------------------


@given(ANY, st.integers(0, 200))
def test_printable_is_printable_ascii(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= limit * 10


def test_the_message_shows_the_path_and_where_the_api_is() -> None:
    refusal = unknown_route("/foo\n\x1b[31m" + "x" * 500)
    assert "/foo" in refusal.message
    assert "/v1" in refusal.message
    assert refusal.message.isprintable()
    assert len(refusal.message) < 250
