"""Formats of earlier years, read and never executed."""
