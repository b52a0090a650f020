"""What commands check without the schema: the names of splits, and the largest sizes.

A size that is larger is a typing mistake.
"""

SPLITS = ("train", "validation", "test")

MOST_ROWS = 2**16  # of a batch; also of other sizes
MOST_PROMPTS = 1024  # of a population, all trained in one step
