"""Polyhead: multi-head attention, described once, run fast, looked into, changed and costed."""

__version__ = "0.1.0"
