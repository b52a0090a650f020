"""Training: optimizer, step, checkpoints and the loop that owns all state."""
