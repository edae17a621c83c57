"""Measurements: every script compares two sides in one run and ends with one JSON line."""
