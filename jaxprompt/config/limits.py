"""The largest sizes of settings and options; whatever is larger is a typing mistake."""

MOST_ROWS = 2**16  # of a batch; also of other sizes
MOST_PROMPTS = 1024  # of a population, all trained in one step
