"""Soft prompts: how they start, how they are tuned, how they are stored."""
