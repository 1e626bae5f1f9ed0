"""From a request to an upstream response: key, limits, attempt, retry."""
