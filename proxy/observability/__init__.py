"""Prometheus metrics, the log, and reports of several workers merged into one."""
