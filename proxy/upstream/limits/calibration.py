"""What a model's answers teach about the size of the next request to it: contract 7, Limits, *learned*.

Two figures a model: how many tokens its text takes against its UTF-8 bytes / 4 (English some 1.0, Chinese some 0.85,
code less), and how long an answer is where the request sets no limit. Only a reservation depends on them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from ...cost.usage import Usage
from .estimate import RequestSize

MODELS: Final = 1000
"""So many are remembered; the one unused for longest goes."""

LOWEST: Final = 0.5
HIGHEST: Final = 2.0
"""Between these the ratio stays: beyond lies an upstream's nonsense, or a prompt that is not what it seems."""

_FADE: Final = 1 / 32
"""The weight of the newest answer."""
_PRIOR: Final = 1024.0
"""Tokens' worth of trust in bytes / 4: one short prompt, most of it the chat's own framing, must not double it all."""
_OUTPUT_FADE: Final = 1 / 8


class _ModelCalibration:
    __slots__ = ("expected", "output", "used")

    def __init__(self) -> None:
        # Sums, not a mean of ratios: long prompts are what fills a limit, so they weigh more.
        self.used = self.expected = _PRIOR
        self.output: float | None = None


class TokenCalibration:
    """Estimates requests, and learns from what they used. Bounded in memory; forgetting costs precision only."""

    def __init__(self) -> None:
        self._habits: OrderedDict[str, _ModelCalibration] = OrderedDict()

    def estimate(self, model: str, measure: RequestSize) -> int:
        """Tokens to reserve for a request of this measure."""
        return measure.tokens(self.ratio(model), self.output(model))

    def used(self, model: str, measure: RequestSize, said: int) -> Usage:
        """What a request of this measure has used by estimate, with an answer of so many bytes of text."""
        ratio = self.ratio(model)
        prompt, completion = measure.prompt_tokens(ratio), math.ceil(said * ratio / 4)
        return Usage(prompt, completion, prompt + completion)

    def ratio(self, model: str) -> float:
        """Tokens of text to its bytes / 4."""
        habit = self._habits.get(model)
        return 1.0 if habit is None else min(max(habit.used / habit.expected, LOWEST), HIGHEST)

    def output(self, model: str) -> int:
        """Tokens of one answer to a request without a limit; 0 until one was seen."""
        habit = self._habits.get(model)
        return 0 if habit is None or habit.output is None else round(habit.output)

    def record(self, model: str, measure: RequestSize, usage: Usage) -> None:
        """Takes note of what a request used."""
        habit = self._habits.get(model)
        if habit is None:
            habit = self._habits[model] = _ModelCalibration()
            if len(self._habits) > MODELS:
                self._habits.popitem(last=False)
        else:
            self._habits.move_to_end(model)
        text = usage.prompt_tokens - measure.counted
        # Of a prompt that is mostly media the rest is noise: how images and audio are counted is a guess, too.
        if measure.text and text > measure.counted:
            expected = measure.text / 4
            # One answer may pull by no more than the clamp allows, however large the number it states.
            actual = min(max(text, LOWEST * expected), HIGHEST * expected)
            habit.expected += expected - habit.expected * _FADE
            habit.used += actual - habit.used * _FADE
        if measure.choices and measure.limit is None:
            each = usage.completion_tokens / measure.choices
            habit.output = each if habit.output is None else habit.output + (each - habit.output) * _OUTPUT_FADE
