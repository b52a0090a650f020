"""Backbones: what they compute, and the files that they come from."""
