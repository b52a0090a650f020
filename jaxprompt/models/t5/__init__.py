"""T5, mT5, umT5, ByT5, Flan-T5."""
