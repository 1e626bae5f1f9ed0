"""`throttle.tier`: OpenAI's published limits by usage tier, as the starting point where nothing else is configured.

The figures are those of platform.openai.com, *Rate limits* and the page of each model. Those of gpt-4o stand for every
model that is not named: if OpenAI allows another one less, its 429s and `x-ratelimit-*` headers say so. A limit under
`throttle.limits` or at a key overrides them, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Final

from .limits import Limits, limits_for

_NAMES: Final = ("free", "1", "2", "3", "4", "5")
_UNITS: Final = {"k": 1_000, "M": 1_000_000}

# model               free           tier 1           tier 2        tier 3        tier 4         tier 5
_FIGURES: Final = """
*                     3/40k/-/200k   500/200k/-/2M    5k/2M/-/10M   5k/10M/-/20M  10k/30M/-/100M 10k/100M/-/300M
gpt-4o-mini*          3/40k/200      500/200k/10k     5k/2M         5k/4M         10k/10M        30k/150M
gpt-4-turbo*          -              500/30k          5k/450k       5k/600k       10k/800k       10k/2M
gpt-4                 -              500/10k/10k      5k/40k        5k/80k        10k/300k       10k/1M
gpt-3.5-turbo*        3/40k/200      3500/200k/10k    3500/2M       3500/4M       10k/10M        10k/50M
text-embedding-*      100/40k/2k     3k/1M            5k/1M         5k/5M         10k/5M         10k/10M
omni-moderation-*     250/10k/5k     500/10k/10k      500/20k       1k/50k        2k/250k        5k/500k
gpt-4-0*              -              500/10k/10k      5k/40k        5k/80k        10k/300k       10k/1M
"""
"""Model glob, then rpm/tpm/rpd/tpd in each tier; `-` where the tier has no figure of its own."""


def _limits(cell: str) -> Limits:
    figures = [None if part == "-" else int(part.rstrip("kM")) * _UNITS.get(part[-1], 1) for part in cell.split("/")]
    return Limits(*figures)


TIERS: Final[Mapping[str, Mapping[str, Limits]]] = {
    tier: {glob: _limits(cells[i]) for glob, *cells in map(str.split, _FIGURES.strip().splitlines()) if cells[i] != "-"}
    for i, tier in enumerate(_NAMES)
}
"""Tier -> model glob -> limits."""


def with_tier(tier: str | None, configured: Mapping[str, Limits]) -> dict[str, Limits]:
    """Return the limits by model glob that hold: the tier's, overridden field by field by the `configured` ones."""
    if tier is None:
        return dict(configured)
    preset = TIERS[tier]
    globs = {**preset, **configured}  # each is looked up in the other table like a model of that name
    return {glob: _over(limits_for(preset, glob), limits_for(configured, glob)) for glob in globs}


def _over(preset: Limits, limits: Limits) -> Limits:
    pairs = zip(astuple(limits), astuple(preset), strict=True)
    return Limits(*(first if first is not None else second for first, second in pairs))
