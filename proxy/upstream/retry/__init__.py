"""Whether a failed attempt is repeated: outcome, policy, circuit breaker, fallback."""
