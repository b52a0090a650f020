"""Attention: one kernel a file."""
