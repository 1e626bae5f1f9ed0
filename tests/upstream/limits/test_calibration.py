"""What is learned of a model makes estimates better, and nothing an upstream says makes them absurd."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cost.usage import Usage
from proxy.upstream.limits.calibration import MAX_MODELS, MAX_RATIO, MIN_RATIO, TokenCalibration
from proxy.upstream.limits.estimate import RequestSize, request_size


def used(prompt: int, completion: int = 0) -> Usage:
    return Usage(prompt, completion, prompt + completion)


def trained(
    calibration: TokenCalibration, times: int, what: RequestSize, usage: Usage, model: str = "m"
) -> TokenCalibration:
    for _ in range(times):
        calibration.record(model, what, usage)
    return calibration


TEXT = RequestSize(text=40_000, counted=0, limit=50, choices=1)


def test_without_learning_the_documented_formula_holds() -> None:
    assert TokenCalibration().estimate("m", TEXT) == 10_050
    assert TokenCalibration().estimate("m", RequestSize(400, 1105, None, 3)) == 1205


@pytest.mark.parametrize(("actual", "ratio"), [(8_000, 0.8), (12_500, 1.25), (100, MIN_RATIO), (10**9, MAX_RATIO)])
def test_the_ratio_follows_what_was_used_within_its_clamp(actual: int, ratio: float) -> None:
    calibration = trained(TokenCalibration(), 100, TEXT, used(actual, 50))
    assert calibration.ratio("m") == pytest.approx(ratio, rel=0.02)
    assert calibration.ratio("another") == 1.0


def test_the_ratio_scales_the_text_alone() -> None:
    calibration = trained(TokenCalibration(), 100, TEXT, used(20_000, 50))
    assert calibration.ratio("m") == pytest.approx(2.0, rel=0.01)
    assert calibration.estimate("m", RequestSize(0, 700, 5_000, 2)) == 10_700
    assert calibration.estimate("m", RequestSize(4_000, 700, 5_000, 1)) == pytest.approx(7_700, abs=20)


def test_completion_tokens_do_not_change_the_text_ratio() -> None:
    calibration = trained(TokenCalibration(), 50, RequestSize(4_000, 0, 9_000, 1), used(1_000, 9_000))
    assert calibration.ratio("m") == pytest.approx(1.0)


def test_media_is_taken_off_before_text_is_compared() -> None:
    calibration = trained(TokenCalibration(), 50, RequestSize(40_000, 1_105, None, 1), used(13_105))
    assert calibration.ratio("m") == pytest.approx(1.2, rel=0.01)
    few_words = trained(TokenCalibration(), 50, RequestSize(400, 11_050, None, 1), used(11_300))
    assert few_words.ratio("m") == 1.0


def test_one_short_prompt_changes_next_to_nothing() -> None:
    """Most of its tokens are the chat's own framing."""
    calibration = trained(
        TokenCalibration(), 1, request_size("chat", {"messages": [{"role": "user", "content": "Hi"}]}), used(8, 9)
    )
    assert calibration.ratio("m") == pytest.approx(1.0, abs=0.01)


def test_the_length_of_an_answer_is_learned_where_no_limit_is_set() -> None:
    free, bound = RequestSize(400, 0, None, 1), RequestSize(400, 0, 10, 1)
    calibration = trained(TokenCalibration(), 1, free, used(100, 300))
    assert calibration.output("m") == 300
    trained(calibration, 50, bound, used(100, 10))
    assert calibration.output("m") == 300, "a limit's answer is no measure of a free one"
    trained(calibration, 50, free, used(100, 500))
    assert calibration.output("m") == pytest.approx(500, abs=2)
    assert calibration.estimate("m", RequestSize(400, 0, None, 2)) == pytest.approx(1_100, abs=5)
    assert calibration.estimate("m", bound) == 110
    assert trained(TokenCalibration(), 3, RequestSize(400, 0, None, 4), used(100, 400)).output("m") == 100
    assert trained(TokenCalibration(), 3, request_size("embeddings", {"input": "x"}), used(1)).output("m") == 0


def test_memory_is_bounded_and_the_least_used_goes() -> None:
    calibration = TokenCalibration()
    for n in range(MAX_MODELS + 10):
        calibration.record(f"m{n}", TEXT, used(20_000))
        calibration.record("m0", TEXT, used(20_000))
    assert len(calibration._models) == MAX_MODELS
    assert calibration.ratio("m0") > 1
    assert calibration.ratio("m1") == 1.0


measures = st.builds(
    RequestSize, st.integers(0, 10**9), st.integers(0, 10**9), st.none() | st.integers(0, 10**9), st.integers(0, 100)
)
usages = st.builds(used, st.integers(0, 10**12), st.integers(0, 10**12))


@given(lessons=st.lists(st.tuples(measures, usages), max_size=20), asked=measures)
@settings(max_examples=300, deadline=None)
def test_estimates_stay_reasonable_whatever_was_learned(
    lessons: list[tuple[RequestSize, Usage]], asked: RequestSize
) -> None:
    calibration = TokenCalibration()
    for what, usage in lessons:
        calibration.record("m", what, usage)
    assert MIN_RATIO <= calibration.ratio("m") <= MAX_RATIO
    assert 0 <= calibration.estimate("m", asked) <= 10**9
    if asked.limit is not None:
        plain = min(asked.text / 4 + asked.counted + asked.limit * asked.choices, 10**9)
        assert calibration.estimate("m", asked) <= MAX_RATIO * plain + 1


@given(ratio=st.floats(0.6, 1.9), sizes=st.lists(st.integers(400, 400_000), min_size=200, max_size=200))
@settings(max_examples=30, deadline=None)
def test_whatever_the_sizes_the_ratio_is_found(ratio: float, sizes: list[int]) -> None:
    calibration = TokenCalibration()
    for size in sizes:
        calibration.record("m", RequestSize(size, 0, 100, 1), used(round(size / 4 * ratio)))
    assert calibration.ratio("m") == pytest.approx(ratio, rel=0.1)
