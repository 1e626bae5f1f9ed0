"""Identical concurrent requests make one upstream call."""
