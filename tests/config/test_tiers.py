"""The tiers as OpenAI publishes them, and that what is configured wins."""

from __future__ import annotations

import pytest

from proxy.config.limits import Limits, limits_for
from proxy.config.tiers import TIERS, with_tier


@pytest.mark.parametrize(
    ("tier", "rpm", "tpm", "tpd"),
    [
        ("free", 3, 40_000, 200_000),
        ("1", 500, 200_000, 2_000_000),
        ("2", 5_000, 2_000_000, 10_000_000),
        ("3", 5_000, 10_000_000, 20_000_000),
        ("4", 10_000, 30_000_000, 100_000_000),
        ("5", 10_000, 100_000_000, 300_000_000),
    ],
)
def test_the_published_table(tier: str, rpm: int, tpm: int, tpd: int) -> None:
    assert limits_for(with_tier(tier, {}), "gpt-4o") == Limits(rpm=rpm, tpm=tpm, tpd=tpd)
    assert set(TIERS) == {"free", "1", "2", "3", "4", "5"}


def test_what_is_configured_wins_field_by_field() -> None:
    table = with_tier("1", {"gpt-4o*": Limits(rpm=9_000, concurrency=4), "gpt-4o-mini": Limits(tpm=7)})
    assert limits_for(table, "gpt-4o") == Limits(rpm=9_000, tpm=200_000, tpd=2_000_000, concurrency=4)
    assert limits_for(table, "gpt-4o-mini") == Limits(rpm=500, tpm=7, rpd=10_000)
    assert limits_for(table, "gpt-4o-mini-2024-07-18") == Limits(rpm=9_000, tpm=200_000, rpd=10_000, concurrency=4)
    assert limits_for(table, "o3") == Limits(rpm=500, tpm=200_000, tpd=2_000_000)
    assert with_tier("2", {"*": Limits(rpm=1)})["*"] == Limits(rpm=1, tpm=2_000_000, tpd=10_000_000)


def test_what_is_configured_for_every_model_holds_for_those_with_figures_of_their_own() -> None:
    table = with_tier("1", {"*": Limits(rpm=10)})
    assert limits_for(table, "gpt-4-0613") == Limits(rpm=10, tpm=10_000, rpd=10_000)
    assert limits_for(table, "text-embedding-3-small") == Limits(rpm=10, tpm=1_000_000)


@pytest.mark.parametrize(
    ("model", "like"),
    [
        ("gpt-4", Limits(rpm=500, tpm=10_000, rpd=10_000)),
        ("gpt-4-0613", Limits(rpm=500, tpm=10_000, rpd=10_000)),
        ("gpt-4-turbo-2024-04-09", Limits(rpm=500, tpm=30_000)),
        ("gpt-4.1", Limits(rpm=500, tpm=200_000, tpd=2_000_000)),
        ("gpt-3.5-turbo-0125", Limits(rpm=3_500, tpm=200_000, rpd=10_000)),
        ("omni-moderation-latest", Limits(rpm=500, tpm=10_000, rpd=10_000)),
        ("text-embedding-3-large", Limits(rpm=3_000, tpm=1_000_000)),
    ],
)
def test_models_with_figures_of_their_own(model: str, like: Limits) -> None:
    assert limits_for(with_tier("1", {}), model) == like


def test_without_a_tier_nothing_is_added() -> None:
    assert with_tier(None, {"a": Limits(rpm=1)}) == {"a": Limits(rpm=1)}
    assert with_tier(None, {}) == {}
