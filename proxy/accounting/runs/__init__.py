"""Named runs: sample numbers and sums."""
