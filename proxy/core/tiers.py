"""`throttle.tier`: OpenAI's published limits by usage tier, as the starting point where nothing else is configured.

The figures are those of gpt-4o (platform.openai.com, *Rate limits*). They stand for every model:
where OpenAI allows another one less, its 429s and `x-ratelimit-*` say so, and a limit under `throttle.limits` or at a
key wins, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .limits import Limits, limits_for

_M: Final = 1_000_000

TIERS: Final[Mapping[str, Mapping[str, Limits]]] = {
    "free": {"*": Limits(rpm=3, tpm=40_000, tpd=200_000)},
    "1": {"*": Limits(rpm=500, tpm=200_000, tpd=2 * _M)},
    "2": {"*": Limits(rpm=5_000, tpm=2 * _M, tpd=10 * _M)},
    "3": {"*": Limits(rpm=5_000, tpm=10 * _M, tpd=20 * _M)},
    "4": {"*": Limits(rpm=10_000, tpm=30 * _M, tpd=100 * _M)},
    "5": {"*": Limits(rpm=10_000, tpm=100 * _M, tpd=300 * _M)},
}
"""Tier -> model glob -> limits."""


def with_tier(tier: str | None, configured: Mapping[str, Limits]) -> dict[str, Limits]:
    """The table of limits by model glob that holds: the tier's, and over it, field by field, the `configured` one."""
    if tier is None:
        return dict(configured)
    preset = TIERS[tier]
    return {**preset, **{glob: _over(limits_for(preset, glob), limits) for glob, limits in configured.items()}}


def _over(preset: Limits, limits: Limits) -> Limits:
    return Limits(
        limits.rpm if limits.rpm is not None else preset.rpm,
        limits.tpm if limits.tpm is not None else preset.tpm,
        limits.rpd if limits.rpd is not None else preset.rpd,
        limits.tpd if limits.tpd is not None else preset.tpd,
        limits.concurrency if limits.concurrency is not None else preset.concurrency,
    )
