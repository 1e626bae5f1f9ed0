"""Counts of what receipts do not hold: retries by cause, and the gaps between two reads of a stream.

They are plain numbers, because a metrics library costs several times as much for each request. They become metrics when
somebody asks for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

GAPS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Bounds of the gaps between two reads, in seconds."""


KNOWN_CODES: Final = frozenset(
    {
        "DeploymentNotFound",
        "ResponsibleAIPolicyViolation",
        "access_terminated",
        "account_deactivated",
        "authentication_error",
        "billing_hard_limit_reached",
        "billing_not_active",
        "content_filter",
        "content_policy_violation",
        "context_length_exceeded",
        "engine_overloaded_error",
        "image_content_policy_violation",
        "insufficient_permissions",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_authentication",
        "invalid_image",
        "invalid_json_schema",
        "invalid_organization",
        "invalid_prompt",
        "invalid_request_error",
        "invalid_type",
        "invalid_value",
        "ip_not_authorized",
        "mismatched_organization",
        "mismatched_project",
        "missing_required_parameter",
        "missing_scope",
        "model_not_found",
        "not_found_error",
        "organization_restricted",
        "overloaded",
        "permission_denied",
        "permission_error",
        "previous_response_not_found",
        "rate_limit_error",
        "rate_limit_exceeded",
        "requests",
        "server_error",
        "service_unavailable",
        "slow_down",
        "string_above_max_length",
        "tokens",
        "unknown_parameter",
        "unsupported_country_region_territory",
        "unsupported_parameter",
        "unsupported_value",
        "user_not_found",
    }
)
"""Codes and types of errors that have a label value of their own."""


class Histogram:
    """A histogram. counts: for each bound, the values up to it and above the one before; then those above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return each bound as text with the number of values up to it, as Prometheus wants it."""
        found, sum_ = [], 0
        for bound, count in zip((*map(float, self.bounds), float("inf")), self.counts, strict=True):
            sum_ += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(sum_)))
        return found


class UpstreamCounters:
    """What is counted of the upstreams.

    retries: by upstream and cause. errors: by upstream, status and the upstream's own code.
    last_success: Unix seconds, by upstream. gaps: seconds between two reads of a stream.
    """

    def __init__(self) -> None:
        self.retries: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.errors: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.last_success: dict[str, float] = {}
        self.gaps = Histogram(GAPS)

    def record_retry(self, upstream: str, why: str) -> None:
        """Count an attempt that another one follows. why: the value of an `OutcomeKind`."""
        self.retries[upstream, why] += 1

    def record_error(self, upstream: str, status: int, code: str) -> None:
        """Count an error response. code: the upstream's own; one that is not known counts as `other`."""
        self.errors[upstream, str(status), code if code in KNOWN_CODES or not code else "other"] += 1

    def reads(self, clock: Callable[[], float]) -> Callable[[], None]:
        """Return a function to call at each read of a stream that begins now. clock: monotonic seconds."""
        last, add = clock(), self.gaps.add

        def read() -> None:
            nonlocal last
            now = clock()
            add(now - last)
            last = now

        return read
