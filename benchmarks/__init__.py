"""Measurements: ratios against a named baseline, taken in turns in one process."""
