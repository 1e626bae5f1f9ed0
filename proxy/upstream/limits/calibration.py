"""Corrects the estimate of a request by what earlier requests to its model used (`docs/keys-and-limits.md`).

Two figures are kept for each model: how many tokens its text takes in proportion to its UTF-8 bytes / 4 (English about
1.0, Chinese about 0.85, code less), and how long an answer is if the request sets no limit. Only reservations depend on
them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from ...cost.usage import Usage
from .estimate import RequestSize

MAX_MODELS: Final = 1000
"""The most models that are remembered; the least recently used one is dropped."""

MIN_RATIO: Final = 0.5
MAX_RATIO: Final = 2.0
"""The ratio stays between these: beyond them the usage is nonsense, or the prompt is not plain text."""

_RATIO_WEIGHT: Final = 1 / 32
"""The weight of the newest answer."""
_PRIOR_TOKENS: Final = 1024.0
"""How many tokens bytes / 4 counts for at the start: one short prompt, mostly the chat's own framing, must not double
the ratio."""
_OUTPUT_WEIGHT: Final = 1 / 8


class _ModelCalibration:
    __slots__ = ("expected", "output", "used")

    def __init__(self) -> None:
        # Sums, not a mean of ratios: long prompts fill a limit, so they weigh more.
        self.used = self.expected = _PRIOR_TOKENS
        self.output: float | None = None


class TokenCalibration:
    """Estimates requests and learns from what they used. Its memory is bounded; forgetting only costs precision."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, _ModelCalibration] = OrderedDict()

    def estimate(self, model: str, size: RequestSize) -> int:
        """Return the tokens to reserve for a request of this size."""
        return size.tokens(self.ratio(model), self.output(model))

    def estimated_usage(self, model: str, size: RequestSize, text_bytes: int) -> Usage:
        """Return what a request of this size has used, by estimate, if its answer has `text_bytes` bytes of text."""
        ratio = self.ratio(model)
        prompt, completion = size.prompt_tokens(ratio), math.ceil(text_bytes * ratio / 4)
        return Usage(prompt, completion, prompt + completion)

    def ratio(self, model: str) -> float:
        """Return the model's tokens of text in proportion to bytes / 4."""
        learned = self._models.get(model)
        return 1.0 if learned is None else min(max(learned.used / learned.expected, MIN_RATIO), MAX_RATIO)

    def output(self, model: str) -> int:
        """Return the tokens of one answer to a request without a limit; 0 until there was one."""
        learned = self._models.get(model)
        return 0 if learned is None or learned.output is None else round(learned.output)

    def record(self, model: str, size: RequestSize, usage: Usage) -> None:
        """Learn from what a request used."""
        learned = self._models.get(model)
        if learned is None:
            learned = self._models[model] = _ModelCalibration()
            if len(self._models) > MAX_MODELS:
                self._models.popitem(last=False)
        else:
            self._models.move_to_end(model)
        text = usage.prompt_tokens - size.counted
        # If most of a prompt is media, its text tells nothing: the media are estimated, too.
        if size.text and text > size.counted:
            expected = size.text / 4
            # One answer may pull the ratio no further than its bounds, however large the usage it states.
            actual = min(max(text, MIN_RATIO * expected), MAX_RATIO * expected)
            learned.expected += expected - learned.expected * _RATIO_WEIGHT
            learned.used += actual - learned.used * _RATIO_WEIGHT
        if size.choices and size.limit is None:
            each = usage.completion_tokens / size.choices
            learned.output = (
                each if learned.output is None else learned.output + (each - learned.output) * _OUTPUT_WEIGHT
            )
