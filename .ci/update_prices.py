"""Writes proxy/cost/prices.json from the installed genai-prices library (MIT). No build and no run needs it.

    python .ci/update_prices.py --as-of 2026-11-10

`--as-of` is the release date of the installed library version; where a price changes by date, the one in
force on that day is taken. Review the diff, run tests/cost/test_pricing.py (it prices every model with the
library again), and note the new date in CHANGELOG.md.

It takes OpenAI's and Azure's models that are priced by token: input, cached input, cache write, output, audio and
images in both directions, the long-context tiers, all that again for each service tier, and the tools billed by the
call. It leaves out prices per hour or character, models without an output price that are not embeddings, and the models
and rates in `NOT_EXACT`: their list price is not what a call costs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

from genai_prices import types
from genai_prices.data import providers

TARGET = Path(__file__).resolve().parent.parent / "proxy" / "cost" / "prices.json"
KINDS = ("openai", "azure")
RATES = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "output": "output_mtok",
    "audio_input": "input_audio_mtok",
    "cached_audio_input": "cache_audio_read_mtok",
    "audio_output": "output_audio_mtok",
    "image_input": "input_image_mtok",
    "cached_image_input": "cache_image_read_mtok",
    "image_output": "output_image_mtok",
    "web_search": "web_searches_kcount",
    "file_search": "storage_searches_kcount",
}
OUTPUTS = {"output", "image_output"}
SERVICES: dict[str, dict[str, str]] = {
    **{tier: {"service_tier": tier} for tier in ("flex", "priority", "fast")},
    "batch": {"processing": "batch"},
}
"""What a service is called here -> how the library is asked for it."""
DATED = r"\^((?:[\w-]|\\\.)+)" + re.escape(r"-\d{4}-\d{2}-\d{2}$")  # a plain name and a date, as a regex
DATE_GLOB = "-" + "-".join("[0-9]" * digits for digits in (4, 2, 2))

# Rules of the library that would catch other models at a wrong price; the explicit names among them stay.
UNSAFE_RULES = {
    ("azure", "o4-mini"): "contains 'o4-mini' also catches o4-mini-deep-research",
    ("openai", "gpt-4"): "fine-tunes of gpt-4 (ft:gpt-4-0…) would be priced as the base model",
    ("openai", "gpt-5-nano"): "any suffix; its only snapshot is named below",
    ("openai", "moderation"): "contains 'moderation' also catches a user's deployment of another model",
}

# Models and rates of the library that would make a wrong cost.
NOT_EXACT = {
    r".*-search-(preview|api).*": "each call searches, and no usage tells how often",
    r".*-deep-research.*": "each call searches, and the price depends on the kind of search",
    r"gpt-oss.*": "open weights: each server sells them at a price of its own",
    r"gpt-5.*-image.*": "the price of the images is missing",
}
NOT_EXACT_RATES = {
    ("gpt-4o-mini", "web_search"): "8,000 input tokens a search are added that usage does not show (OpenAI: Pricing)",
    ("gpt-4.1-mini", "web_search"): "the same",
}

# Models the library lacks or has incompletely. Moderation is free. Fine-tunes: OpenAI's published rates, on
# which genai-prices (where it has them) and LiteLLM's price list agree; genai-prices has no cached rate for
# the first two.
SUPPLEMENT: dict[str, dict[str, Any]] = {
    "ft:gpt-4o": {
        "input": "3.75", "cached_input": "1.875", "output": "15", "patterns": ["ft:gpt-4o-2024-*"],
    },
    "ft:gpt-4o-mini": {
        "input": "0.3", "cached_input": "0.15", "output": "1.2", "patterns": ["ft:gpt-4o-mini-2024-*"],
    },
    "ft:gpt-4.1": {
        "input": "3", "cached_input": "0.75", "output": "12", "patterns": ["ft:gpt-4.1-2025-*"],
    },
    "ft:gpt-4.1-mini": {
        "input": "0.8", "cached_input": "0.2", "output": "3.2", "patterns": ["ft:gpt-4.1-mini-2025-*"],
    },
    "ft:gpt-4.1-nano": {
        "input": "0.2", "cached_input": "0.05", "output": "0.8", "patterns": ["ft:gpt-4.1-nano-2025-*"],
    },
    "ft:o4-mini": {
        "input": "4", "cached_input": "1", "output": "16", "patterns": ["ft:o4-mini-2025-*"],
    },
    "omni-moderation-latest": {
        "input": "0", "output": "0",
        "names": ["omni-moderation", "omni-moderation-2024-09-26", "text-moderation", "text-moderation-007",
                  "text-moderation-latest", "text-moderation-stable"],
    },
}  # fmt: skip

EXTRA_NAMES = {
    "gpt-5-nano": ["gpt-5-nano-2025-08-07"],
}


def build(as_of: date) -> dict[str, Any]:
    """The whole document. Raises ValueError for a rule or price of the library that it cannot express."""
    document: dict[str, Any] = {
        "as_of": as_of.isoformat(),
        "unit": "USD per 1,000,000 tokens",
        "source": {
            "name": "genai-prices",
            "version": version("genai-prices"),
            "license": licence_text().splitlines(),
        },
    }
    for provider in providers:
        if provider.id in KINDS:
            document[provider.id] = dict(entries(provider, as_of))
    document["openai"] |= {model: {**entry, "supplement": True} for model, entry in SUPPLEMENT.items()}
    return document


def entries(provider: types.Provider, as_of: date) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each model of `provider` that is priced by token, as (id, entry)."""
    for model in provider.models:
        rates = rates_of(model, as_of)
        is_embedding = any(name.startswith("text-embedding") for name in (model.id, *names_and_globs(model.match)[0]))
        if "input" not in rates or not_exact(model.id) or not (rates.keys() & OUTPUTS or is_embedding):
            continue
        if services := services_of(model, as_of, rates):
            rates["services"] = services
        names, globs = names_and_globs(model.match)
        if (provider.id, model.id) in UNSAFE_RULES:
            globs = []
        names += EXTRA_NAMES.get(model.id, [])
        # Azure's model names have no dot in 3.5.
        names += [name.replace("gpt-3.5", "gpt-35") for name in (model.id, *names) if name.startswith("gpt-3.5")]
        globs += [glob.replace("gpt-3.5", "gpt-35") for glob in globs if glob.startswith("gpt-3.5")]
        # The library takes the first model that matches: a name belongs to the model it finds, to no other.
        mine = {
            name
            for name in names
            if name != model.id and not not_exact(name) and provider.find_model(name) in (model, None)
        }
        if mine:
            rates["names"] = sorted(mine)
        if globs:
            rates["patterns"] = sorted(globs)
        yield model.id, rates


def not_exact(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in NOT_EXACT)


def services_of(model: types.ModelInfo, as_of: date, standard: dict[str, Any]) -> dict[str, Any]:
    """The rates of each service tier that the library has prices of its own for."""
    found = {name: rates_of(model, as_of, context) for name, context in SERVICES.items()}
    return {name: rates for name, rates in found.items() if rates != standard}


def rates_of(model: types.ModelInfo, as_of: date, context: dict[str, str] | None = None) -> dict[str, Any]:
    """Rates in force at noon of `as_of`, with `tiers` where they depend on the number of prompt tokens."""
    for condition in model.prices if isinstance(model.prices, list) else ():
        if isinstance(condition.constraint, types.TimeOfDateConstraint):
            raise ValueError(f"{model.id}: prices by time of day are not supported")
        if condition.constraint is not None and condition.constraint.start_date > as_of:
            print(f"note: {model.id} changes its price on {condition.constraint.start_date}", file=sys.stderr)
    prices = model.get_prices(datetime(as_of.year, as_of.month, as_of.day, 12, tzinfo=UTC), context)
    found = {
        name: price
        for name, key in RATES.items()
        if (model.id, name) not in NOT_EXACT_RATES and (price := getattr(prices, key, None)) is not None
    }
    if "gpt-image" in model.id and "image_output" not in found:
        found["image_output"] = found.pop("output")  # what their text costs is not said
    starts = sorted({tier.start for price in found.values() if not isinstance(price, Decimal) for tier in price.tiers})
    rates: dict[str, Any] = {name: rate_at(price, 0) for name, price in found.items()}
    if starts:
        rates["tiers"] = [
            {"above": start, **{name: rate_at(price, start + 1) for name, price in found.items()}} for start in starts
        ]
    return rates


def rate_at(price: Decimal | types.TieredPrices, tokens: int) -> str:
    """The rate for a prompt of `tokens`, without an exponent."""
    if not isinstance(price, Decimal):
        price = next((tier.price for tier in reversed(price.tiers) if tokens > tier.start), price.base)
    return format(price.normalize(), "f")


def names_and_globs(rule: types.MatchLogic) -> tuple[list[str], list[str]]:
    """A matching rule as explicit names and fnmatch globs."""
    match rule:
        case types.ClauseEquals(equals=name):
            return [name], []
        case types.ClauseStartsWith(starts_with=prefix):
            return [], [prefix + "*"]
        case types.ClauseContains(contains=part):
            return [part], ["*" + part + "*"]
        case types.ClauseRegex(regex=regex) if (dated := re.fullmatch(DATED, regex)) is not None:
            return [], [dated[1].replace("\\.", ".") + DATE_GLOB]
        case types.ClauseOr(or_=rules):
            parts = [names_and_globs(part) for part in rules]
            return [name for names, _ in parts for name in names], [glob for _, globs in parts for glob in globs]
    raise ValueError(f"unknown rule: {rule}")


def licence_text() -> str:
    files = distribution("genai-prices").files or []
    return next(file for file in files if file.name == "LICENSE").read_text()


def render(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--as-of", required=True, type=date.fromisoformat, help="release date of the library, YYYY-MM-DD"
    )
    TARGET.write_text(render(build(parser.parse_args().as_of)), encoding="utf-8")
