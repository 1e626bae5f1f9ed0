"""What a response costs: exact decimals from a price list, or nothing. Never a float, never a guess.

The built-in list is `proxy/cost/prices.json`, which `.ci/update_prices.py` writes from the genai-prices library; to
read it once is the only IO here. Whatever has no rate in it (tokens of a kind, a service tier, a tool) makes a cost
unknown. Which cost is known, and why, is in `docs/costs-and-budgets.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Context, Decimal
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from .usage import Usage

Kind = Literal["openai", "azure"]
Seller = Kind | Literal["none"]
"""Whose built-in prices apply to an upstream: OpenAI's, Azure's, or nobody's, so that only configured prices count."""

Status = Literal["exact", "estimated"]

_EXACT: Final = Context(prec=60)  # tokens have at most 13 digits, rates at most 10 + 18: nothing is ever rounded
_ZERO: Final = Decimal(0)
_PER_MILLION: Final = Decimal("0.000001")
_PER_THOUSAND: Final = Decimal("0.001")
_MAX_NAME: Final = 256  # no model name is longer, and the memo's keys stay small
_MEMO_SIZE: Final = 1024
_MAX_RATE: Final = Decimal(10**9)
_MAX_PLACES: Final = 18
_TOKEN_RATES: Final = (
    "input", "cached_input", "cache_write", "output", "audio_input", "cached_audio_input", "audio_output",
    "image_input", "cached_image_input", "image_output",
)  # fmt: skip
_CALL_RATES: Final = ("web_search", "file_search")
RATE_NAMES: Final = (*_TOKEN_RATES, *_CALL_RATES)
"""The rates that a price may have: USD per million tokens, and USD per thousand calls of a tool."""

DEFAULT_TIERS: Final = (None, "", "auto", "default", "standard")
"""Values of `service_tier` that cost the standard price."""

_NO_OVERRIDES: Final[Mapping[str, Mapping[str, Decimal]]] = MappingProxyType({})

# How OpenAI and Azure name snapshots: gpt-4o-2024-08-06, gpt-4-0613.
_MONTH_DAY = "(?:0[1-9]|1[0-2]){}(?:0[1-9]|[12][0-9]|3[01])"
_TRAILING_DATE = re.compile(rf"-(?:20[0-9]{{2}}-{_MONTH_DAY.format('-')}|{_MONTH_DAY.format('')})\Z")

_SPECIAL: Final = re.compile(r"ft:|.*(?:\.ft-|-search-(?:preview|api)|-deep-research|\bgpt-oss)", re.DOTALL)
"""Fine-tuned models, models whose calls have fees that usage does not show (searches), and models of open weights,
which every server sells at a price of its own: if they are not in the list, no other name stands for them."""

_HOST = re.compile(r"[a-z]+://(?:[^/@]*@)?(\[[^\]]*\]|[^/:?#]*)", re.IGNORECASE)
_OTHER_PRICES: Final = (
    ".api.openai.com", ".azure.us", ".azure.cn", "models.github.ai", "models.inference.ai.azure.com",
)  # fmt: skip
_LOOPBACK = re.compile(r"localhost|.*\.localhost|127\.[0-9.]+|\[(?:::1|::ffff:127\.[0-9.]+)\]")


class Cost(msgspec.Struct, frozen=True):
    """status: `estimated` if the price of the undated model was used for a dated one that is not in the table."""

    usd: Decimal
    status: Status


@dataclass(frozen=True, slots=True)
class _Rates:
    """USD for a token, and for a call of a tool; None if there is no rate.

    tiers: (more prompt tokens than this, rates), largest first. services: by service tier, whatever differs from the
    default one.
    """

    input: Decimal
    cached_input: Decimal
    cache_write: Decimal
    output: Decimal | None
    tiers: tuple[tuple[int, _Rates], ...] = ()
    audio_input: Decimal | None = None
    cached_audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None
    cached_image_input: Decimal | None = None
    image_output: Decimal | None = None
    web_search: Decimal | None = None
    file_search: Decimal | None = None
    services: Mapping[str, _Rates] = field(default_factory=dict)

    def tokens_alone(self) -> _Rates:
        """Return the rates of tokens in the default tier: another seller's tools and tiers have other prices."""
        tiers = tuple((above, rates.tokens_alone()) for above, rates in self.tiers)
        return replace(self, tiers=tiers, web_search=None, file_search=None, services={})


@dataclass(frozen=True, slots=True)
class _Section:
    """One provider's models: names, and globs for names that cannot be listed (fine-tuned models)."""

    names: Mapping[str, _Rates]
    patterns: tuple[tuple[str, _Rates], ...]

    def find(self, name: str) -> _Rates | None:
        return self.names.get(name) or _by_glob(self.patterns, name)


def seller_of(kind: Kind, base_url: str, *, pooled: bool, passthrough: bool, prices: str | None = None) -> Seller:
    """Return whose built-in prices apply to an upstream.

    OpenAI's regional hosts (`eu.api.openai.com` …), Azure's clouds for governments and China, and GitHub Models have
    prices of their own, which the list does not hold. A server without a key is not billed by OpenAI, unless the proxy
    passes the clients' own keys through to it.

    pooled: the upstream is called with a credential of the proxy's. passthrough: no upstream is. prices: the upstream's
    setting `prices`, if it is `openai` or `none`.
    """
    if prices is not None:
        return "openai" if prices == "openai" else "none"
    found = _HOST.match(base_url)
    host = found[1].lower() if found else ""
    if not pooled and (not passthrough or _LOOPBACK.fullmatch(host)):
        return "none"
    if host.endswith(_OTHER_PRICES):
        return "none"
    return "azure" if host.endswith(".azure.com") else kind


class PriceTable:
    """Built-in prices under `overrides`: model glob -> rates (`RATE_NAMES`), USD per 1M tokens or 1,000 calls.

    An override replaces the built-in entry whole. If it has no rate for cached tokens of a kind, they cost the rate of
    that kind; if it has no `output`, a response with completion tokens has no known cost. Raises ValueError naming the
    glob for an unknown rate, a missing `input`, or an amount that is not a finite decimal from 0 to 10**9 with at most
    18 places.
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
        """Return the days since the date of the built-in list."""
        return (today - date.fromisoformat(self.as_of)).days

    def cost(
        self,
        seller: Seller,
        models: Sequence[str | None],
        usage: Usage,
        service_tier: object = None,
        deployment: str | None = None,
    ) -> Cost | None:
        """Return the cost of `usage` in USD, or None if it is not known. Never raises, whatever the names are.

        A cost that the upstream itself states is taken. Else an override of the deployment wins, then one of the
        models, so that the price set for a deployment holds although its responses name a snapshot; then the first
        model that is in the list decides, by its name or without its trailing date.

        models: the response's model and the one asked for, in this order. service_tier: the response's; a tier without
        rates of its own for the model (`scale` is paid in advance) has no known cost. deployment: Azure's, if any.
        """
        if usage.stated_cost:
            return Cost(Decimal(usage.stated_cost), "exact")
        found = self._resolve(seller, models, deployment)
        if found is None:
            return None
        rates, status = found
        if service_tier not in DEFAULT_TIERS:
            special = rates.services.get(service_tier) if isinstance(service_tier, str) else None
            if special is None:
                return None
            rates = special
        for above, tier in rates.tiers:
            if usage.prompt_tokens > above:  # all tokens change their price, not only those above
                rates = tier
                break
        amount = _text(rates, usage) if usage.plain else _all_kinds(rates, usage)
        return None if amount is None else Cost(amount, status)

    def _resolve(
        self, seller: Seller, models: Sequence[object], deployment: str | None
    ) -> tuple[_Rates, Status] | None:
        names = [name for name in models if isinstance(name, str) and len(name) <= _MAX_NAME]
        key = (seller, deployment or "", *names)
        try:
            return self._memo[key]
        except KeyError:
            pass
        found = self._search(seller, names, deployment)
        if len(self._memo) >= _MEMO_SIZE:
            self._memo.clear()  # only invented names fill it; the real ones are found again after one search each
        self._memo[key] = found
        return found

    def _search(self, seller: Seller, names: Sequence[str], deployment: str | None) -> tuple[_Rates, Status] | None:
        for name in (deployment, *names) if deployment else names:
            if rates := self._overridden(name):
                return rates, "exact"
        # Beside the name of a special model, another name would give another model's price.
        for name in [name for name in names if _SPECIAL.match(name)] or names:
            if rates := self._listed(seller, name):
                return rates, "exact"
            undated = _TRAILING_DATE.sub("", name)
            if undated != name and (rates := self._overridden(undated) or self._listed(seller, undated)):
                return rates, "estimated"
        return None

    def _overridden(self, name: str) -> _Rates | None:
        return self._names.get(name) or _by_glob(self._globs, name)

    def _listed(self, seller: Seller, name: str) -> _Rates | None:
        if seller == "none":
            return None
        if seller == "azure":
            rates = self._sections["azure"].find(name) or self._sections["openai"].find(name)
            return None if rates is None else rates.tokens_alone()
        return self._sections["openai"].find(name)


def total_cost(costs: Sequence[Cost | None]) -> Cost | None:
    """Return the sum; None if one of them is unknown."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    amount = _ZERO
    for cost in known:
        amount = _EXACT.add(amount, cost.usd)
    return Cost(amount, "estimated" if any(cost.status == "estimated" for cost in known) else "exact")


def _text(rates: _Rates, usage: Usage) -> Decimal | None:
    """Return the cost of a response with nothing but text; None if a kind of token has no rate."""
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
    return amount


def _all_kinds(rates: _Rates, usage: Usage) -> Decimal | None:
    """Return the cost of a response with more than text; None if a kind has no rate or cannot be told apart."""
    if usage.unpriced:
        return None
    heard = usage.heard_tokens
    pictured = usage.image_tokens if rates.image_input is not None else 0  # without a rate images are ordinary input
    text = usage.prompt_tokens - usage.cache_write_tokens - heard - pictured
    if usage.cache_write_tokens and (heard or pictured) and rates.cache_write != rates.input:
        return None  # the kinds of the tokens that were written are not told
    written = usage.completion_tokens - usage.spoken_tokens - usage.drawn_tokens + usage.extra_reasoning_tokens
    amount = _sum(
        (
            (rates.input, text),
            (rates.cache_write, usage.cache_write_tokens),
            (rates.audio_input, heard),
            (rates.image_input, pictured),
            (rates.output, written),
            (rates.audio_output, usage.spoken_tokens),
            (rates.image_output, usage.drawn_tokens),
            (rates.web_search, usage.web_searches),
            (rates.file_search, usage.file_searches),
        )
    )
    if amount is None or not usage.cached_tokens:
        return amount
    cached_image = usage.cached_image_tokens if pictured else 0
    saved = _cache_discount(
        (
            (
                text,
                usage.cached_text_tokens + usage.cached_image_tokens - cached_image,
                rates.input,
                rates.cached_input,
            ),
            (heard, usage.cached_audio_tokens, rates.audio_input, rates.cached_audio_input),
            (pictured, cached_image, rates.image_input, rates.cached_image_input),
        ),
        usage.cached_tokens,
    )
    return None if saved is None else _EXACT.subtract(amount, saved)


def _sum(parts: Sequence[tuple[Decimal | None, int]]) -> Decimal | None:
    """Return the sum of rate * count; None if a count is negative or has no rate."""
    amount = _ZERO
    for rate, count in parts:
        if count < 0 or (count and rate is None):
            return None
        if count and rate is not None:
            amount = _EXACT.fma(rate, count, amount)
    return amount


def _cache_discount(kinds: Sequence[tuple[int, int, Decimal | None, Decimal | None]], cached: int) -> Decimal | None:
    """Return by how much `cached` tokens are cheaper; None if it depends on kinds that the usage does not tell.

    kinds: (tokens, those of them known to be cached, rate, rate if cached). A kind without a rate for cached tokens
    has no discount.
    """
    untold = cached - sum(known for _, known, _, _ in kinds)
    saved = _ZERO
    possible = []
    for count, known, rate, cached_rate in kinds:
        if known > count:
            return None
        discount = _ZERO if rate is None or cached_rate is None else _EXACT.subtract(rate, cached_rate)
        saved = _EXACT.fma(discount, known, saved)
        if count > known:
            possible.append((count - known, discount))
    room = sum(count for count, _ in possible)
    if untold < 0 or untold > room:
        return None
    if 0 < untold < room and len({discount for _, discount in possible}) > 1:
        return None
    for count, discount in possible:  # either all of them are cached, or it does not matter which
        saved = _EXACT.fma(discount, min(count, untold), saved)
        untold -= min(count, untold)
    return saved


@lru_cache(1024)
def usd(amount: Decimal) -> str:
    """Return `amount` exactly, without exponent, with six places or more. Raises ValueError if it is not finite."""
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
        if name not in RATE_NAMES:
            raise ValueError(f"{glob}: {name!r} is not one of {', '.join(RATE_NAMES)}")
        if not isinstance(rate, Decimal) or not rate.is_finite() or not 0 <= rate <= _MAX_RATE:
            raise ValueError(f"{glob}: {name} is not an amount of USD")
        if rate != round(rate, _MAX_PLACES):
            raise ValueError(f"{glob}: {name} has more than {_MAX_PLACES} places")
    if "input" not in rates:
        raise ValueError(f"{glob}: input is missing")
    return _rates(rates)


def _rates(entry: Mapping[str, Any]) -> _Rates:
    """Return the rates of an entry with USD per million tokens and per thousand calls.

    If a model has no rate for cached or cache-write tokens, they are ordinary input.
    """
    amounts = {name: _EXACT.multiply(Decimal(entry[name]), _PER_MILLION) for name in _TOKEN_RATES if name in entry}
    amounts |= {name: _EXACT.multiply(Decimal(entry[name]), _PER_THOUSAND) for name in _CALL_RATES if name in entry}
    tiers = sorted(((tier["above"], _rates(tier)) for tier in entry.get("tiers", ())), key=lambda tier: -tier[0])
    services = {name: _rates(service) for name, service in entry.get("services", {}).items()}
    plain = amounts["input"]
    defaults: dict[str, Any] = {"cached_input": plain, "cache_write": plain, "output": None}
    return _Rates(**(defaults | amounts), tiers=tuple(tiers), services=services)


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
