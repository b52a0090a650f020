"""Answers of a tuned model: ranking, generation, scores."""
