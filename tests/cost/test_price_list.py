"""The vendored price list against the library it comes from."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage as LibraryUsage
from genai_prices import calc_price
from genai_prices.data import providers

from proxy.cost.pricing import RATE_NAMES, Cost, Kind, PriceTable
from proxy.cost.usage import Usage

ROOT = Path(__file__).parents[2]
FILE = ROOT / "proxy" / "cost" / "prices.json"
TOOL = ROOT / ".ci" / "update_prices.py"
DOCUMENT = json.loads(FILE.read_text(encoding="utf-8"))
KINDS: tuple[Kind, ...] = ("openai", "azure")
TABLE = PriceTable()

same_library = pytest.mark.skipif(
    version("genai-prices") != DOCUMENT["source"]["version"],
    reason="prices.json is of another library version",
)


def tokens(prompt: int, completion: int = 0, cached: int = 0, written: int = 0) -> Usage:
    return Usage(prompt, completion, prompt + completion, cached, written)


def test_the_list_names_its_source() -> None:
    assert date.fromisoformat(TABLE.as_of) == date.fromisoformat(DOCUMENT["as_of"])
    assert DOCUMENT["source"]["name"] == "genai-prices"
    assert any("MIT License" in line for line in DOCUMENT["source"]["license"])
    assert any("Copyright" in line for line in DOCUMENT["source"]["license"])


def test_a_name_belongs_to_one_model() -> None:
    for kind in KINDS:
        names = [name for model, entry in DOCUMENT[kind].items() for name in {model, *entry.get("names", ())}]
        assert len(names) == len(set(names))


def vendored() -> Iterator[tuple[Kind, str, Mapping[str, Any]]]:
    """Every name in the list, with one example of each name that stands as a glob."""
    for kind in KINDS:
        for model, entry in DOCUMENT[kind].items():
            for name in (model, *entry.get("names", ())):
                yield kind, name, entry
            for glob in entry.get("patterns", ()):
                yield kind, glob.replace("[0-9]", "1").replace("*", "x"), entry


@same_library
def test_every_model_costs_what_the_library_says() -> None:
    draw = random.Random(4)
    noon = datetime.fromisoformat(DOCUMENT["as_of"]).replace(hour=12, tzinfo=UTC)
    compared = 0
    for kind, name, entry in vendored():
        if entry.get("supplement"):
            continue
        for largest in (10, 5_000, 272_000, 272_001, 1_000_000):
            prompt = draw.choice((largest, draw.randint(0, largest)))
            cached = draw.choice((0, draw.randint(0, prompt)))
            written = draw.choice((0, draw.randint(0, prompt - cached)))
            completion = draw.randint(0, 50_000) if "output" in entry else 0
            usage = tokens(prompt, completion, cached, written)
            try:
                expected = calc_price(
                    LibraryUsage(
                        input_tokens=prompt,
                        cache_read_tokens=cached,
                        cache_write_tokens=written,
                        output_tokens=completion,
                    ),
                    name,
                    provider_id=kind,
                    genai_request_timestamp=noon,
                )
            except LookupError:
                assert name.startswith("gpt-35-"), "only the names the tool adds"
                continue
            assert TABLE.cost(kind, [name], usage) == Cost(expected.total_price, "exact"), (kind, name, usage)
            compared += 1
    assert compared > 1000


SERVICES: tuple[tuple[str, dict[str, str]], ...] = (
    ("default", {"service_tier": "default"}),
    ("flex", {"service_tier": "flex"}),
    ("priority", {"service_tier": "priority"}),
    ("fast", {"service_tier": "fast"}),
    ("batch", {"processing": "batch"}),
)


def draw_usage(draw: random.Random, rates: Mapping[str, Any], prompt: int) -> tuple[LibraryUsage, Usage]:
    """Return the same usage for the library and for the table, with every kind of token that has a rate."""
    parts = {"text": draw.randint(0, prompt)}
    for kind in ("audio", "image"):
        if f"{kind}_input" in rates:
            parts[kind] = draw.randint(0, prompt - sum(parts.values()))
    parts["text"] = prompt - sum(parts.values()) + parts["text"]
    cached = {
        kind: draw.randint(0, count)
        for kind, count in parts.items()
        if ("cached_input" if kind == "text" else f"cached_{kind}_input") in rates
    }
    made = {
        kind: draw.randint(1, 5000)
        for kind, rate in (("text", "output"), ("audio", "audio_output"), ("image", "image_output"))
        if rate in rates
    }
    searches, files = (draw.randint(0, 9) if rate in rates else 0 for rate in ("web_search", "file_search"))
    theirs = LibraryUsage(
        input_tokens=prompt,
        cache_read_tokens=sum(cached.values()),
        input_audio_tokens=parts.get("audio", 0),
        cache_audio_read_tokens=cached.get("audio", 0),
        input_image_tokens=parts.get("image", 0),
        cache_image_read_tokens=cached.get("image", 0),
        output_tokens=sum(made.values()),
        output_audio_tokens=made.get("audio", 0),
        output_image_tokens=made.get("image", 0) if "output" in rates else 0,
        web_searches=searches,
        storage_searches=files,
    )
    ours = Usage(
        prompt,
        sum(made.values()),
        prompt + sum(made.values()),
        cached_tokens=sum(cached.values()),
        heard_tokens=parts.get("audio", 0),
        spoken_tokens=made.get("audio", 0),
        image_tokens=parts.get("image", 0),
        web_searches=searches,
        file_searches=files,
        cached_text_tokens=cached.get("text", 0),
        cached_audio_tokens=cached.get("audio", 0),
        cached_image_tokens=cached.get("image", 0),
        drawn_tokens=made.get("image", 0),
    )
    return theirs, ours


@same_library
@pytest.mark.parametrize(("tier", "context"), SERVICES, ids=[tier for tier, _ in SERVICES])
def test_every_kind_of_token_and_tool_in_every_tier_costs_what_the_library_says(tier: str, context: Any) -> None:
    draw = random.Random(7)
    noon = datetime.fromisoformat(DOCUMENT["as_of"]).replace(hour=12, tzinfo=UTC)
    compared = set()
    for name, entry in DOCUMENT["openai"].items():
        rates = entry if tier == "default" else entry.get("services", {}).get(tier)
        if entry.get("supplement") or rates is None:
            continue
        for prompt in (draw.randint(0, 5000), 272_000, 272_001):
            theirs, ours = draw_usage(draw, rates, prompt)
            expected = calc_price(
                theirs, name, provider_id="openai", genai_request_timestamp=noon, price_context=context
            )
            got = TABLE.cost("openai", [name], ours, tier)
            assert got == Cost(expected.total_price, "exact"), (name, theirs)
        compared |= {rate for rate in RATE_NAMES if rate in rates} | {name}
    assert len(compared) > 20
    if tier == "default":
        assert set(RATE_NAMES) <= compared


@same_library
def test_every_text_model_of_the_library_is_in_the_list() -> None:
    noon = datetime.fromisoformat(DOCUMENT["as_of"]).replace(hour=12, tzinfo=UTC)
    not_exact = runpy.run_path(str(TOOL))["not_exact"]
    for provider in providers:
        for model in provider.models:
            prices = model.get_prices(noon)
            if prices.input_mtok is None or prices.output_mtok is None:
                continue
            usage = tokens(1) if "gpt-image" in model.id else tokens(1, 1)
            for kind in KINDS:
                if provider.id == kind:
                    assert (TABLE.cost(kind, [model.id], usage) is None) == not_exact(model.id), model.id


@same_library
@pytest.mark.skipif(not TOOL.exists(), reason="the tool is not part of the package")
def test_the_list_is_the_output_of_the_tool() -> None:
    tool = runpy.run_path(str(TOOL))
    assert tool["render"](tool["build"](date.fromisoformat(DOCUMENT["as_of"]))) == FILE.read_text(encoding="utf-8")
