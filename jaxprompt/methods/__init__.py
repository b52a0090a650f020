"""Tuning methods: how trainables start, what they inject, how they are stored."""
