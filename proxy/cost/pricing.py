"""What an answer costs: exact decimals from a vendored price list, or nothing. Never a float, never a guess.

The list is `proxy/prices.json`, package data written by `.ci/update_prices.py` from the genai-prices library;
reading it once is the only IO in the core. What it has no rate for (tokens of a kind, a service tier, a tool) makes a
cost unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Context, Decimal
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from .usage import Usage

Kind = Literal["openai", "azure"]
Status = Literal["exact", "estimated"]

_EXACT = Context(prec=60)  # tokens have at most 13 digits, rates at most 10 + 18: nothing is ever rounded
_ZERO = Decimal(0)
_PER_MILLION = Decimal("0.000001")
_PER_THOUSAND = Decimal("0.001")
_LONGEST_NAME = 256  # no model name is longer, and the memo's keys stay small
_MEMO_SIZE = 1024
_LARGEST_RATE = Decimal(10**9)
_MOST_PLACES = 18
_RATE_NAMES = ("input", "cached_input", "cache_write", "output")
_DETAIL_NAMES = ("audio_input", "audio_output", "image_input")
_TOOL_NAMES = ("web_search", "file_search")
_DEFAULT_TIERS = (None, "", "auto", "default", "standard")
_NO_OVERRIDES: Mapping[str, Mapping[str, Decimal]] = MappingProxyType({})

# How OpenAI and Azure name snapshots: gpt-4o-2024-08-06, gpt-4-0613.
_MONTH_DAY = "(?:0[1-9]|1[0-2]){}(?:0[1-9]|[12][0-9]|3[01])"
_TRAILING_DATE = re.compile(rf"-(?:20[0-9]{{2}}-{_MONTH_DAY.format('-')}|{_MONTH_DAY.format('')})\Z")


class Cost(msgspec.Struct, frozen=True):
    """`estimated`: the price of the undated model was used for a dated one that is not in the table."""

    usd: Decimal
    status: Status


@dataclass(frozen=True, slots=True)
class _Rates:
    """USD a token, and a call of a tool. None: there is no rate. `tiers`: (more prompt tokens than, rates), largest
    first; `services`: by service tier, what is other than the default one.
    """

    input: Decimal
    cached_input: Decimal
    cache_write: Decimal
    output: Decimal | None
    tiers: tuple[tuple[int, _Rates], ...] = ()
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None
    web_search: Decimal | None = None
    file_search: Decimal | None = None
    services: Mapping[str, _Rates] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Section:
    """One provider's models: explicit names, and globs for names that cannot be listed (fine-tunes)."""

    names: Mapping[str, _Rates]
    patterns: tuple[tuple[str, _Rates], ...]

    def find(self, name: str) -> _Rates | None:
        return self.names.get(name) or _by_glob(self.patterns, name)


class PriceTable:
    """Built-in prices under `overrides`: model glob -> {input, cached_input, output} in USD per 1M tokens.

    An override replaces the built-in entry whole; where it gives no `cached_input`, cached tokens cost
    `input`; where it gives no `output`, an answer with completion tokens has no known cost. Raises ValueError
    naming the glob for an unknown rate, a missing `input`, or an amount that is not a finite decimal from 0
    to 10**9 with at most 18 places.
    """

    __slots__ = ("_globs", "_memo", "_names", "_sections", "as_of")

    as_of: str
    """The date of the built-in list, YYYY-MM-DD."""

    def __init__(self, overrides: Mapping[str, Mapping[str, Decimal]] = _NO_OVERRIDES) -> None:
        self.as_of, self._sections = _built_in()
        self._names = {glob: _override(glob, rates) for glob, rates in overrides.items()}
        self._globs = _longest_first({glob: rates for glob, rates in self._names.items() if set(glob) & set("*?[")})
        self._memo: dict[tuple[str, ...], tuple[_Rates, Status] | None] = {}

    def age(self, today: date) -> int:
        """Days since the date of the built-in list."""
        return (today - date.fromisoformat(self.as_of)).days

    def cost(self, kind: Kind, models: Sequence[str | None], usage: Usage, service_tier: object = None) -> Cost | None:
        """The cost of `usage` in USD, or None where it is not known; never raises, whatever the names are.

        `models` are the answer's model and the one asked for, in this order. An override of any of them wins,
        so that the price set for a deployment holds although its answers name a snapshot; then the first that
        is in the list decides: by its name, else without its trailing date. `kind` azure looks in Azure's
        list first. `service_tier` is the answer's: a tier without rates of its own for the model (`scale` is paid in
        advance) has no known cost.
        """
        found = self._resolve(kind, models)
        if found is None:
            return None
        rates, status = found
        if service_tier not in _DEFAULT_TIERS:
            special = rates.services.get(service_tier) if isinstance(service_tier, str) else None
            if special is None or kind == "azure":  # Azure's tiers have prices of their own, which nobody lists
                return None
            rates = special
        for above, tier in rates.tiers:
            if usage.prompt_tokens > above:  # all tokens change price, not only those above
                rates = tier
                break
        if not usage.plain:
            return _with_details(rates, status, usage)
        plain = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
        if plain < 0:
            return None
        amount = _EXACT.multiply(rates.input, plain)
        if usage.cached_tokens:
            amount = _EXACT.fma(rates.cached_input, usage.cached_tokens, amount)
        if usage.cache_write_tokens:
            amount = _EXACT.fma(rates.cache_write, usage.cache_write_tokens, amount)
        if usage.completion_tokens:
            if rates.output is None:
                return None
            amount = _EXACT.fma(rates.output, usage.completion_tokens, amount)
        return Cost(amount, status)

    def _resolve(self, kind: Kind, models: Sequence[object]) -> tuple[_Rates, Status] | None:
        names = [name for name in models if isinstance(name, str) and len(name) <= _LONGEST_NAME]
        key = (kind, *names)
        try:
            return self._memo[key]
        except KeyError:
            pass
        found = self._search(kind, names)
        if len(self._memo) >= _MEMO_SIZE:
            self._memo.clear()  # only invented names fill it; the real ones are back after one search each
        self._memo[key] = found
        return found

    def _search(self, kind: Kind, names: Sequence[str]) -> tuple[_Rates, Status] | None:
        for name in names:
            if rates := self._overridden(name):
                return rates, "exact"
        for name in names:
            if rates := self._listed(kind, name):
                return rates, "exact"
            undated = _TRAILING_DATE.sub("", name)
            if undated != name and (rates := self._overridden(undated) or self._listed(kind, undated)):
                return rates, "estimated"
        return None

    def _overridden(self, name: str) -> _Rates | None:
        return self._names.get(name) or _by_glob(self._globs, name)

    def _listed(self, kind: Kind, name: str) -> _Rates | None:
        if kind == "azure" and (rates := self._sections["azure"].find(name)):
            return rates
        return self._sections["openai"].find(name)


def total_cost(costs: Sequence[Cost | None]) -> Cost | None:
    """All of them together; None where one is unknown."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    amount = _ZERO
    for cost in known:
        amount = _EXACT.add(amount, cost.usd)
    return Cost(amount, "estimated" if any(cost.status == "estimated" for cost in known) else "exact")


def _with_details(rates: _Rates, status: Status, usage: Usage) -> Cost | None:
    """The cost where there is more than text, or None where one kind has no rate or it cannot be told apart."""
    if usage.unpriced:
        return None
    heard, spoken = usage.heard_tokens, usage.spoken_tokens
    pictured = usage.image_tokens if rates.image_input is not None else 0  # else images are ordinary input
    if (heard or pictured) and usage.cached_tokens and rates.cached_input != rates.input:
        return None  # how much of the audio and the images was cached is not said
    plain = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens - heard - pictured
    parts = (
        (rates.input, plain),
        (rates.cached_input, usage.cached_tokens),
        (rates.cache_write, usage.cache_write_tokens),
        (rates.audio_input, heard),
        (rates.image_input, pictured),
        (rates.output, usage.completion_tokens - spoken),
        (rates.audio_output, spoken),
        (rates.web_search, usage.web_searches),
        (rates.file_search, usage.file_searches),
    )
    amount = _ZERO
    for rate, count in parts:
        if count < 0 or (count and rate is None):
            return None
        if count and rate is not None:
            amount = _EXACT.fma(rate, count, amount)
    return Cost(amount, status)


@lru_cache(1024)
def usd(amount: Decimal) -> str:
    """`amount`, exact, without exponent, with at least six places: "0.002250". ValueError if not finite."""
    if not amount.is_finite():
        raise ValueError(f"not an amount: {amount}")
    whole, _, places = format(amount if amount else _ZERO, "f").partition(".")
    return f"{whole}.{places.rstrip('0'):0<6}"


def _by_glob(globs: Sequence[tuple[str, _Rates]], name: str) -> _Rates | None:
    return next((rates for glob, rates in globs if fnmatchcase(name, glob)), None)


def _longest_first(globs: Mapping[str, _Rates]) -> tuple[tuple[str, _Rates], ...]:
    return tuple(sorted(globs.items(), key=lambda item: -len(item[0])))


def _override(glob: str, rates: Mapping[str, object]) -> _Rates:
    for name, rate in rates.items():
        if name not in _RATE_NAMES:
            raise ValueError(f"{glob}: {name!r} is not one of {', '.join(_RATE_NAMES)}")
        if not isinstance(rate, Decimal) or not rate.is_finite() or not 0 <= rate <= _LARGEST_RATE:
            raise ValueError(f"{glob}: {name} is not an amount of USD per million tokens")
        if rate != round(rate, _MOST_PLACES):
            raise ValueError(f"{glob}: {name} has more than {_MOST_PLACES} places")
    if "input" not in rates:
        raise ValueError(f"{glob}: input is missing")
    return _rates(rates)


def _rates(entry: Mapping[str, Any]) -> _Rates:
    """Of an entry with USD per million tokens and per thousand calls. Where a model has no rate of its own for cached
    or cache-write tokens, they are ordinary input.
    """
    names = (*_RATE_NAMES, *_DETAIL_NAMES)
    amounts = {name: _EXACT.multiply(Decimal(entry[name]), _PER_MILLION) for name in names if name in entry}
    calls = {name: _EXACT.multiply(Decimal(entry[name]), _PER_THOUSAND) for name in _TOOL_NAMES if name in entry}
    tiers = sorted(((tier["above"], _rates(tier)) for tier in entry.get("tiers", ())), key=lambda tier: -tier[0])
    plain = amounts["input"]
    return _Rates(
        plain,
        amounts.get("cached_input", plain),
        amounts.get("cache_write", plain),
        amounts.get("output"),
        tuple(tiers),
        **{name: amounts[name] for name in _DETAIL_NAMES if name in amounts},
        **calls,
        services={name: _rates(service) for name, service in entry.get("services", {}).items()},
    )


@cache
def _built_in() -> tuple[str, Mapping[str, _Section]]:
    document = json.loads(resources.files(__package__).joinpath("prices.json").read_bytes())
    return document["as_of"], {kind: _section(document[kind]) for kind in ("openai", "azure")}


def _section(models: Mapping[str, Mapping[str, Any]]) -> _Section:
    names: dict[str, _Rates] = {}
    patterns: dict[str, _Rates] = {}
    for model, entry in models.items():
        rates = _rates(entry)
        names |= dict.fromkeys((model, *entry.get("names", ())), rates)
        patterns |= dict.fromkeys(entry.get("patterns", ()), rates)
    return _Section(names, _longest_first(patterns))
