"""Recheck: which sources died or changed, which objects rotted, and what could be repaired."""
