"""Evaluation: answers, metrics, and a look inside prompts."""
