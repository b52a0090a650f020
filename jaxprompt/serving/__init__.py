"""Serving: one frozen backbone answers requests of many prompts, in shared batches.

README.md says how the parts belong together.
"""
