from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cost.pricing import Cost, Kind, PriceTable, Seller, seller_of, usd
from proxy.cost.usage import NO_TOKENS, Usage

KINDS: tuple[Kind, ...] = ("openai", "azure")
TABLE = PriceTable()
MILLION = 10**6


def tokens(prompt: int, completion: int = 0, cached: int = 0, written: int = 0) -> Usage:
    return Usage(prompt, completion, prompt + completion, cached, written)


def price(model: str | None, usage: Usage, kind: Kind = "openai", table: PriceTable = TABLE) -> str | None:
    cost = table.cost(kind, [model], usage)
    return None if cost is None else usd(cost.usd)


# What must come out to the digit.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "prompt", "completion", "expected"),
    [
        ("gpt-4o", 100, 200, "0.002250"),
        ("gpt-4o", 1520, 3840, "0.042200"),
        ("gpt-4o", 42, 287, "0.002975"),
        ("gpt-4o", 234, 567, "0.006255"),
        ("gpt-4o-mini", 1000, 2000, "0.001350"),
        ("gpt-4-turbo", 100, 200, "0.007000"),
        ("o1-preview", 1000, 2000, "0.135000"),
        ("gpt-4", MILLION, 0, "30.000000"),
        ("gpt-4", 0, MILLION, "60.000000"),
        ("gpt-3.5-turbo", MILLION, 0, "0.500000"),
        ("gpt-3.5-turbo", 0, MILLION, "1.500000"),
        ("gpt-35-turbo", MILLION, MILLION, "2.000000"),
        ("gpt-35-turbo-1106", MILLION, MILLION, "3.000000"),
        ("text-embedding-3-small", 8, 0, "0.00000016"),
        ("text-embedding-3-large", MILLION, 0, "0.130000"),
        ("text-embedding-ada-002", MILLION, 0, "0.100000"),
        ("gpt-4.1", 1, 1, "0.000010"),
        ("gpt-4o", 0, 0, "0.000000"),
    ],
)
def test_prices_of_known_requests(kind: Kind, model: str, prompt: int, completion: int, expected: str) -> None:
    assert price(model, tokens(prompt, completion), kind) == expected
    assert TABLE.cost(kind, [model], tokens(prompt, completion)) == Cost(Decimal(expected), "exact")


def test_cached_tokens_are_billed_once_and_at_their_rate() -> None:
    assert price("gpt-4o-2024-08-06", tokens(1000, 100, cached=200)) == "0.003250"
    assert price("gpt-4o", tokens(1000, 0, cached=1000)) == "0.001250"
    assert price("gpt-4o-2024-05-13", tokens(1000, 0, cached=1000)) == "0.005000", "no cached rate: the input rate"


def test_cache_writes_have_their_rate_where_the_model_has_one() -> None:
    assert price("gpt-6-sol", tokens(1000, 0, cached=200, written=300)) == "0.001790"
    assert price("gpt-4o", tokens(1000, 0, written=300)) == "0.002500"


@pytest.mark.parametrize(
    ("prompt", "cached", "completion", "expected"),
    [
        (272_000, 0, 1000, "1.390000"),
        (272_001, 0, 1000, "2.765010"),
        (300_000, 1000, 1000, "3.036000"),
    ],
)
def test_a_long_context_changes_the_price_of_all_tokens(
    prompt: int, cached: int, completion: int, expected: str
) -> None:
    assert price("gpt-5.5", tokens(prompt, completion, cached)) == expected


def test_moderations_are_free() -> None:
    for model in ("omni-moderation-latest", "text-moderation-latest"):
        assert TABLE.cost("openai", [model], NO_TOKENS) == Cost(Decimal(0), "exact")
        assert price(model, tokens(500)) == "0.000000"


@pytest.mark.parametrize(
    "usage",
    [
        pytest.param(Usage(10, 10, 20, heard_tokens=1), id="audio in"),
        pytest.param(Usage(10, 10, 20, spoken_tokens=1), id="audio out"),
        pytest.param(Usage(10, 10, 20, unpriced=1), id="a container"),
        pytest.param(Usage(10, 10, 20, cached_tokens=11), id="more cached than prompt"),
    ],
)
def test_an_unpriced_kind_of_token_has_no_cost(usage: Usage) -> None:
    assert TABLE.cost("openai", ["gpt-4o"], usage) is None


@pytest.mark.parametrize(
    ("model", "tier", "expected"),
    [
        ("gpt-5.4", None, "0.004000"),
        ("gpt-5.4", "default", "0.004000"),
        ("gpt-5.4", "auto", "0.004000"),
        ("gpt-5.4", "flex", "0.002000"),
        ("gpt-5.4", "priority", "0.008000"),
        ("gpt-5.4", "batch", "0.002000"),
        ("gpt-5.4", "scale", None),
        ("gpt-5.4", ["flex"], None),
        ("gpt-4", "flex", None),
    ],
)
def test_a_service_tier_has_rates_of_its_own_or_none(model: str, tier: object, expected: str | None) -> None:
    cost = TABLE.cost("openai", [model], tokens(1000, 100), tier)
    assert (cost and usd(cost.usd)) == expected


def test_azures_service_tiers_are_not_openais() -> None:
    assert TABLE.cost("azure", ["gpt-5.4"], tokens(1000, 100), "priority") is None
    assert TABLE.cost("azure", ["gpt-5.4"], tokens(1000, 100), "default") is not None


def test_a_configured_price_applies_to_the_default_tier() -> None:
    table = PriceTable({"gpt-5.4": {"input": Decimal(1), "output": Decimal(1)}})
    assert table.cost("openai", ["gpt-5.4"], tokens(1000, 0)) == Cost(Decimal("0.001"), "exact")
    assert table.cost("openai", ["gpt-5.4"], tokens(1000, 0), "flex") is None


def test_audio_is_priced_as_audio() -> None:
    """gpt-audio: 2.50 and 10 for text, 32 and 64 for audio, USD per million."""
    spoken = Usage(1000, 500, 1500, heard_tokens=400, spoken_tokens=300)
    assert price("gpt-audio", spoken) == "0.035500"
    cached = Usage(1000, 0, 1000, cached_tokens=100, heard_tokens=400)
    assert price("gpt-audio", cached) == "0.014300", "no cached rate: it does not matter what was cached"
    assert price("gpt-4o-mini-realtime-preview", cached) is None, "how much of it was audio is not said"


def test_image_tokens_without_a_rate_count_as_input() -> None:
    assert price("gpt-4o", Usage(1000, 0, 1000, cached_tokens=100, image_tokens=300)) == "0.002375"


def test_tools_are_priced_by_the_call() -> None:
    searched = Usage(1000, 0, 1000, web_searches=2, file_searches=1)
    assert price("gpt-5.4", searched) == "0.025000"
    assert price("gpt-4", searched) is None


def test_an_embedding_model_has_no_price_for_completions() -> None:
    assert price("text-embedding-3-small", tokens(10, 1)) is None


def test_the_callers_decimal_context_rounds_nothing() -> None:
    with localcontext() as context:
        context.prec = 3
        assert price("gpt-4o", tokens(123_457, 98_765)) == "1.2962925"
        assert price("gpt-4o", tokens(10**12 + 1, 10**12 + 1)) == "12500000.0000125"


# Which model a name means.


@pytest.mark.parametrize(
    ("kind", "name", "like", "status"),
    [
        ("openai", "gpt-4o-2024-08-06", "gpt-4o", "exact"),
        ("openai", "gpt-4-0613", "gpt-4", "exact"),
        ("openai", "gpt-4o-2099-01-01", "gpt-4o", "estimated"),
        ("openai", "gpt-4-1231", "gpt-4", "estimated"),
        ("openai", "gpt-6-luna-2026-09-01", "gpt-6-luna", "exact"),
        ("azure", "gpt-35-turbo-0125", "gpt-3.5-turbo", "exact"),
        ("azure", "gpt-35-turbo-16k", "gpt-3.5-turbo-16k", "exact"),
        ("openai", "ft:gpt-4o-2024-08-06:org::id", "ft:gpt-4o", "exact"),
        ("openai", "ft:gpt-4o-mini-2024-07-18:org:name:id-0101", "ft:gpt-4o-mini", "exact"),
        ("openai", "ft:gpt-4.1-nano-2025-04-14:org::id", "ft:gpt-4.1-nano", "exact"),
        ("openai", "ft:gpt-3.5-turbo-0125:org::id", "ft:gpt-3.5-turbo-", "exact"),
        ("azure", "gpt-4o-mini-2024-07-18.ft-0123456789abcdef", "ft:gpt-4o-mini", "exact"),
    ],
)
def test_models_are_found_by_name(kind: Kind, name: str, like: str, status: str) -> None:
    usage = tokens(1000, 100)
    cost, expected = TABLE.cost(kind, [name], usage), TABLE.cost("openai", [like], usage)
    assert cost is not None
    assert expected is not None
    assert (cost.usd, cost.status) == (expected.usd, status)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "GPT-4o",
        "gpt-4o ",
        "gpt-4o-2024-13-01",
        "gpt-4o-2024-08-32",
        "gpt-4o-1301",
        "gpt-4o-2024-08-06\n",
        "gpt-4o-２０２４-08-06",
        "gpt-4o-2099-01-01-0101",
        "ft:gpt-4-0613:org::id",
        "ft:unheard-of-2024-08-06:org::id",
        "my-moderation-bot",
        "phi-4",
        "\x00\x1b[31m\r\n",
        "\ud800",
        "gpt-4o" * 4000,
        "*",
        "[",
    ],
)
def test_unknown_names_have_no_cost(name: str) -> None:
    assert price(name, tokens(10, 10)) is None


def test_azures_list_comes_first_and_is_azures_alone() -> None:
    assert price("phi-4", tokens(MILLION), "azure") == "0.125000"
    assert price("gpt-4o", tokens(MILLION), "azure") == "2.500000"


@pytest.mark.parametrize("names", [[], [None], [None, None], [1, 2.5, True], [["gpt-4o"], {"a": 1}], [b"gpt-4o"]])
def test_names_that_are_not_text_have_no_cost(names: Any) -> None:
    assert TABLE.cost("openai", names, tokens(1)) is None


def test_the_responses_model_is_priced_before_the_requested_one() -> None:
    usage = tokens(MILLION)
    assert TABLE.cost("openai", ["gpt-4o-mini", "gpt-4o"], usage) == Cost(Decimal("0.15"), "exact")
    assert TABLE.cost("openai", ["unheard-of", "gpt-4o"], usage) == Cost(Decimal("2.5"), "exact")
    assert TABLE.cost("openai", [None, "gpt-4o"], usage) == Cost(Decimal("2.5"), "exact")
    assert TABLE.cost("openai", ("gpt-4o-2099-01-01", "gpt-4"), usage) == Cost(Decimal("2.5"), "estimated")


@given(name=st.text(max_size=40) | st.from_regex(r"(ft:)?(gpt|o)-?[0-9o]{1,2}.{0,20}(-[0-9]{4}){0,2}"))
def test_any_name_gives_a_price_or_none(name: str) -> None:
    cost = TABLE.cost("azure", [name, name[:5]], tokens(1, 1))
    assert cost is None or cost.usd >= 0


def test_the_memo_is_bounded() -> None:
    table = PriceTable()
    for number in range(5000):
        assert price(f"invented-{number}", tokens(1), table=table) is None
    assert len(table._memo) <= 1024
    assert price("gpt-4o", tokens(MILLION), table=table) == "2.500000"


# Overrides.


def overridden(**rates: str) -> dict[str, Decimal]:
    return {name: Decimal(rate) for name, rate in rates.items()}


OVERRIDES = {
    "gpt-4o*": overridden(input="7", output="7"),
    "gpt-4o-mini*": overridden(input="3", output="4", cached_input="1"),
    "gpt-4o": overridden(input="1", output="2"),
    "my-deployment": overridden(input="5", output="6"),
    "my-vectors": overridden(input="0.01"),
    "gpt-5.5": overridden(input="1", output="1"),
}


@pytest.mark.parametrize(
    ("model", "usage", "expected"),
    [
        pytest.param("gpt-4o", tokens(MILLION, MILLION), "3.000000", id="exact"),
        pytest.param(
            "gpt-4o",
            tokens(MILLION, 0, cached=MILLION),
            "1.000000",
            id="no cached rate of the built-in entry",
        ),
        pytest.param("gpt-4o-2024-08-06", tokens(MILLION, MILLION), "14.000000", id="glob"),
        pytest.param("gpt-4o-mini-2024-07-18", tokens(MILLION, MILLION, cached=MILLION), "5.000000", id="longest glob"),
        pytest.param("my-deployment", tokens(MILLION, MILLION), "11.000000", id="a name of their own"),
        pytest.param("my-deployment-2025-01-01", tokens(MILLION), "5.000000", id="without its date"),
        pytest.param("my-vectors", tokens(1), "0.00000001", id="embedding"),
        pytest.param("my-vectors", tokens(1, 1), None, id="no output rate"),
        pytest.param("gpt-5.5", tokens(MILLION), "1.000000", id="no tiers of the built-in entry"),
        pytest.param("gpt-4.1", tokens(MILLION), "2.000000", id="others keep theirs"),
    ],
)
def test_configured_prices_replace_listed_ones(model: str, usage: Usage, expected: str | None) -> None:
    for kind in KINDS:
        assert price(model, usage, kind, PriceTable(OVERRIDES)) == expected


def test_a_configured_price_of_the_requested_model_beats_the_listed_price_of_the_response() -> None:
    cost = PriceTable(OVERRIDES).cost("azure", ["gpt-4.1-2025-04-14", "my-deployment"], tokens(MILLION))
    assert cost == Cost(Decimal(5), "exact")


@pytest.mark.parametrize(
    "rates",
    [
        {},
        {"output": Decimal(1)},
        {"input": Decimal(1), "batch": Decimal(1)},
        {"input": Decimal(-1)},
        {"input": Decimal("nan")},
        {"input": Decimal("inf")},
        {"input": Decimal("1E+10")},
        {"input": Decimal("1E-19")},
        {"input": Decimal("1E-1000000")},
        {"input": 0.1},
        {"input": True},
        {"input": "1"},
    ],
)
def test_an_invalid_configured_price_names_its_glob(rates: Any) -> None:
    with pytest.raises(ValueError, match="my-model"):
        PriceTable({"my-model": rates})


# Prices that are not the list's.


@pytest.mark.parametrize(
    ("kind", "base_url", "pooled", "passthrough", "prices", "seller"),
    [
        ("openai", "https://api.openai.com/v1", True, False, None, "openai"),
        ("openai", "https://api.openai.com/v1", False, True, None, "openai"),
        ("openai", "https://gateway.example.com/v1", True, False, None, "openai"),
        ("openai", "http://127.0.0.1:4000/v1", True, False, None, "openai"),
        # A regional host has prices of its own.
        ("openai", "https://eu.api.openai.com/v1", True, False, None, "none"),
        ("openai", "https://US.api.openai.com:443/v1", False, True, None, "none"),
        ("openai", "https://eu.api.openai.com/v1", True, False, "openai", "openai"),
        # Nobody bills a local server without a key.
        ("openai", "http://127.0.0.1:8000/v1", False, False, None, "none"),
        ("openai", "http://127.0.0.1:8000/v1", False, True, None, "none"),
        ("openai", "http://localhost:11434/v1", False, True, None, "none"),
        ("openai", "http://[::1]:8000/v1", False, True, None, "none"),
        ("openai", "http://vllm.internal:8000/v1", False, False, None, "none"),
        ("openai", "http://vllm.internal:8000/v1", False, True, None, "openai"),
        ("openai", "http://127.0.0.1:8000/v1", False, False, "openai", "openai"),
        ("openai", "https://api.openai.com/v1", True, False, "none", "none"),
        ("azure", "https://name.openai.azure.com", True, False, None, "azure"),
        ("azure", "https://name.openai.azure.com", True, False, "none", "none"),
        ("openai", "https://name.openai.azure.com/openai/v1", True, False, None, "azure"),
        ("openai", "https://name.cognitiveservices.azure.com/openai/v1", True, False, None, "azure"),
        ("azure", "https://name.openai.azure.us", True, False, None, "none"),
        ("openai", "https://models.github.ai/inference", True, False, None, "none"),
        ("azure", "http://127.0.0.1:9000", False, True, None, "none"),
        ("openai", "", False, True, None, "openai"),
    ],
)
def test_whose_prices_apply(
    kind: Kind, base_url: str, pooled: bool, passthrough: bool, prices: str | None, seller: Seller
) -> None:
    assert seller_of(kind, base_url, pooled=pooled, passthrough=passthrough, prices=prices) == seller


def test_without_a_seller_only_configured_prices_apply() -> None:
    table = PriceTable({"gpt-4o": overridden(input="1", output="2")})
    assert table.cost("none", ["gpt-4o-mini"], tokens(MILLION)) is None
    assert table.cost("none", ["gpt-4o-mini-2024-07-18", "gpt-4o"], tokens(MILLION)) == Cost(Decimal(1), "exact")


@pytest.mark.parametrize(
    "names",
    [
        ["gpt-4o-search-preview"],
        ["gpt-4o-mini-search-preview-2025-03-11", "gpt-4o-mini-search-preview"],
        ["gpt-5-search-api-2025-10-14", "gpt-5"],
        ["gpt-4o-mini", "gpt-4o-mini-search-preview"],
        ["o3-deep-research"],
        ["o4-mini-deep-research-2025-06-26", "o4-mini"],
        ["gpt-oss-120b"],
        ["gpt-oss-20b", "gpt-4o"],
        ["openai/gpt-oss-120b", "gpt-4o"],
        ["gpt-oss:20b", "gpt-4o"],
        ["ft:gpt-5-2025-08-07:org::id", "gpt-5"],
        ["gpt-4o-2024-08-06.ft-0123456789abcdef", "gpt-4o"],
        ["gpt-5-2025-08-07", "ft:gpt-5-2025-08-07:org::id"],
    ],
)
def test_another_models_price_is_never_taken_for_a_special_one(names: list[str]) -> None:
    for kind in KINDS:
        assert TABLE.cost(kind, names, tokens(1000, 100)) is None
    own = PriceTable({names[-1]: overridden(input="1", output="1")})
    assert own.cost("openai", names, tokens(1000)) == Cost(Decimal("0.001"), "exact")


def test_a_fine_tuned_model_keeps_its_price_although_the_response_names_its_base() -> None:
    names = ["gpt-4o-2024-08-06", "ft:gpt-4o-2024-08-06:org::id"]
    assert TABLE.cost("openai", names, tokens(MILLION)) == Cost(Decimal("3.75"), "exact")


def test_azures_tools_are_not_openais() -> None:
    for usage in (Usage(1000, 0, 1000, web_searches=1), Usage(1000, 0, 1000, file_searches=1)):
        assert TABLE.cost("azure", ["gpt-5"], usage) is None
    table = PriceTable({"gpt-5": overridden(input="1", web_search="35")})
    assert table.cost("azure", ["gpt-5"], Usage(1000, 0, 1000, web_searches=1)) == Cost(Decimal("0.036"), "exact")
    assert TABLE.cost("azure", ["gpt-5.4"], tokens(300_000)) is not None, "the long context"
    assert TABLE.cost("azure", ["gpt-5.4"], Usage(300_000, 0, 300_000, web_searches=1)) is None


def test_a_deployments_price_goes_before_the_models() -> None:
    table = PriceTable({"gpt-4o*": overridden(input="7", output="7"), "my-ptu": overridden(input="0", output="0")})
    models = ["gpt-4o-2024-08-06", "gpt-4o"]
    assert table.cost("azure", models, tokens(MILLION), None, "my-ptu") == Cost(Decimal(0), "exact")
    assert table.cost("azure", models, tokens(MILLION), None, "other") == Cost(Decimal(7), "exact")
    assert TABLE.cost("azure", ["mystery", "gpt-4o"], tokens(MILLION), None, "gpt-4") == Cost(Decimal("2.5"), "exact")


def test_a_cost_that_the_upstream_states_is_taken() -> None:
    stated = Usage(10, 10, 20, unpriced=1, stated_cost="0.00014")
    for seller in ("openai", "azure", "none"):
        assert TABLE.cost(seller, ["mystery"], stated, "scale") == Cost(Decimal("0.00014"), "exact")
    assert TABLE.cost("openai", ["gpt-4o"], stated) == Cost(Decimal("0.00014"), "exact")


def test_searches_of_the_small_models_are_not_priced() -> None:
    """OpenAI adds 8,000 input tokens to each of their searches, which usage does not show."""
    for model in ("gpt-4o-mini", "gpt-4.1-mini"):
        assert price(model, Usage(1000, 0, 1000, web_searches=1)) is None
        assert price(model, Usage(1000, 0, 1000, file_searches=1)) is not None


# gpt-realtime: 4, 0.40 cached and 16 for text; 32, 0.40 cached and 64 for audio; 5 and 0.50 cached for images.
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(1000, 0, 1000, heard_tokens=400), "0.015200"),
        (Usage(1000, 0, 1000, image_tokens=400), "0.004400"),
        (Usage(1000, 0, 1000, 300, heard_tokens=400, cached_text_tokens=100, cached_audio_tokens=200), "0.008520"),
        (Usage(1000, 0, 1000, 300, image_tokens=400, cached_text_tokens=200, cached_image_tokens=100), "0.003230"),
        (Usage(1000, 0, 1000, 300, heard_tokens=1000), "0.022520"),
        (Usage(1000, 0, 1000, 1000, heard_tokens=400), "0.000400"),
        (Usage(1000, 0, 1000, 300, heard_tokens=400), None),
        (Usage(1000, 0, 1000, 300, heard_tokens=400, cached_audio_tokens=100), None),
        (Usage(1000, 0, 1000, 300, heard_tokens=400, cached_audio_tokens=400), None),
        (Usage(1000, 0, 1000, 300, cached_text_tokens=200, heard_tokens=800), "0.022520"),
        (Usage(0, 500, 500, spoken_tokens=300), "0.022400"),
        (Usage(0, 500, 500, drawn_tokens=300), None),
    ],
)
def test_cached_tokens_are_priced_by_their_kind(usage: Usage, expected: str | None) -> None:
    assert price("gpt-realtime", usage) == expected


def test_images_that_a_model_makes() -> None:
    drawn = Usage(1000, 4000, 5000, image_tokens=200, drawn_tokens=4000)
    assert price("gpt-image-1", drawn) == "0.166000"
    assert price("gpt-image-1.5", drawn) == "0.133600"
    assert price("gpt-image-1.5", Usage(0, 4000, 4000, drawn_tokens=3000)) == "0.106000"
    assert price("gpt-image-2", Usage(0, 4000, 4000, drawn_tokens=3000)) is None, "what its text costs is not known"


def test_reasoning_beside_the_completion_is_output() -> None:
    table = PriceTable({"grok-4": overridden(input="3", output="15")})
    assert price("grok-4", Usage(100, 10, 410, extra_reasoning_tokens=300), table=table) == "0.004950"


def test_an_override_may_price_every_kind_of_token() -> None:
    rates = dict.fromkeys(("input", "output", "audio_input", "image_output"), Decimal(1))
    usage = Usage(MILLION, MILLION, 2 * MILLION, heard_tokens=MILLION, drawn_tokens=MILLION)
    assert price("m", usage, table=PriceTable({"m": rates})) == "2.000000"


# Amounts as text.


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("0", "0.000000"),
        ("-0", "0.000000"),
        ("0E-9", "0.000000"),
        ("0E+9", "0.000000"),
        ("0.00225", "0.002250"),
        ("2.25E-3", "0.002250"),
        ("1E-12", "0.000000000001"),
        ("0.0022500000", "0.002250"),
        ("0.00000250", "0.0000025"),
        ("1E+3", "1000.000000"),
        ("12.5", "12.500000"),
        ("-0.5", "-0.500000"),
        ("123456789012345678901234567890.1234567", "123456789012345678901234567890.1234567"),
    ],
)
def test_amounts_in_usd(amount: str, expected: str) -> None:
    assert usd(Decimal(amount)) == expected


@given(st.decimals(allow_nan=False, allow_infinity=False, places=12))
def test_amounts_in_usd_are_exact(amount: Decimal) -> None:
    text = usd(amount)
    assert Decimal(text) == amount
    assert len(text.partition(".")[2]) >= 6


@pytest.mark.parametrize("amount", ["nan", "inf", "-inf"])
def test_invalid_amounts_are_refused(amount: str) -> None:
    with pytest.raises(ValueError, match="amount"):
        usd(Decimal(amount))
