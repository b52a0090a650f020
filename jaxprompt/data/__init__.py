"""Data: rows from anywhere, as text, as ids, as batches. NumPy only; no devices."""
