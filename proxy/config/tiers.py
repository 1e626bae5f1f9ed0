"""`throttle.tier`: OpenAI's published limits by usage tier, as the starting point where nothing else is configured.

Figures of platform.openai.com, *Rate limits* and the page of each model. Those of gpt-4o stand for every model that is
not named: where OpenAI allows another one less, its 429s and `x-ratelimit-*` say so. A limit under `throttle.limits` or
at a key wins, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .limits import Limits, limits_for

_M: Final = 1_000_000

_NAMES: Final = ("free", "1", "2", "3", "4", "5")

_FIGURES: Final[Mapping[str, tuple[Limits | None, ...]]] = {
    "*": (
        Limits(rpm=3, tpm=40_000, tpd=200_000),
        Limits(rpm=500, tpm=200_000, tpd=2 * _M),
        Limits(rpm=5_000, tpm=2 * _M, tpd=10 * _M),
        Limits(rpm=5_000, tpm=10 * _M, tpd=20 * _M),
        Limits(rpm=10_000, tpm=30 * _M, tpd=100 * _M),
        Limits(rpm=10_000, tpm=100 * _M, tpd=300 * _M),
    ),
    "gpt-4o-mini*": (
        Limits(rpm=3, tpm=40_000, rpd=200),
        Limits(rpm=500, tpm=200_000, rpd=10_000),
        Limits(rpm=5_000, tpm=2 * _M),
        Limits(rpm=5_000, tpm=4 * _M),
        Limits(rpm=10_000, tpm=10 * _M),
        Limits(rpm=30_000, tpm=150 * _M),
    ),
    "gpt-4-turbo*": (
        None,
        Limits(rpm=500, tpm=30_000),
        Limits(rpm=5_000, tpm=450_000),
        Limits(rpm=5_000, tpm=600_000),
        Limits(rpm=10_000, tpm=800_000),
        Limits(rpm=10_000, tpm=2 * _M),
    ),
    "gpt-4": (
        None,
        Limits(rpm=500, tpm=10_000, rpd=10_000),
        Limits(rpm=5_000, tpm=40_000),
        Limits(rpm=5_000, tpm=80_000),
        Limits(rpm=10_000, tpm=300_000),
        Limits(rpm=10_000, tpm=_M),
    ),
    "gpt-3.5-turbo*": (
        Limits(rpm=3, tpm=40_000, rpd=200),
        Limits(rpm=3_500, tpm=200_000, rpd=10_000),
        Limits(rpm=3_500, tpm=2 * _M),
        Limits(rpm=3_500, tpm=4 * _M),
        Limits(rpm=10_000, tpm=10 * _M),
        Limits(rpm=10_000, tpm=50 * _M),
    ),
    "text-embedding-*": (
        Limits(rpm=100, tpm=40_000, rpd=2_000),
        Limits(rpm=3_000, tpm=_M),
        Limits(rpm=5_000, tpm=_M),
        Limits(rpm=5_000, tpm=5 * _M),
        Limits(rpm=10_000, tpm=5 * _M),
        Limits(rpm=10_000, tpm=10 * _M),
    ),
    "omni-moderation-*": (
        Limits(rpm=250, tpm=10_000, rpd=5_000),
        Limits(rpm=500, tpm=10_000, rpd=10_000),
        Limits(rpm=500, tpm=20_000),
        Limits(rpm=1_000, tpm=50_000),
        Limits(rpm=2_000, tpm=250_000),
        Limits(rpm=5_000, tpm=500_000),
    ),
}
"""Model glob -> limits in each tier, None where the tier has nothing of its own for it."""

_ALIASES: Final[Mapping[str, str]] = {"gpt-4-0*": "gpt-4"}

TIERS: Final[Mapping[str, Mapping[str, Limits]]] = {
    tier: {
        glob: limits
        for glob, named in [*((glob, glob) for glob in _FIGURES), *_ALIASES.items()]
        if (limits := _FIGURES[named][number]) is not None
    }
    for number, tier in enumerate(_NAMES)
}
"""Tier -> model glob -> limits."""


def with_tier(tier: str | None, configured: Mapping[str, Limits]) -> dict[str, Limits]:
    """The table of limits by model glob that holds: the tier's, and over it, field by field, the `configured` one."""
    if tier is None:
        return dict(configured)
    preset = TIERS[tier]
    globs = {**preset, **configured}  # each is looked up in the other table like a model of that name
    return {glob: _over(limits_for(preset, glob), limits_for(configured, glob)) for glob in globs}


def _over(preset: Limits, limits: Limits) -> Limits:
    return Limits(
        limits.rpm if limits.rpm is not None else preset.rpm,
        limits.tpm if limits.tpm is not None else preset.tpm,
        limits.rpd if limits.rpd is not None else preset.rpd,
        limits.tpd if limits.tpd is not None else preset.tpd,
        limits.concurrency if limits.concurrency is not None else preset.concurrency,
    )
