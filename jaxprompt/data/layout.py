"""How the examples of a batch share its rows and columns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchLayout:
    """Who shares the rows of a batch, and how wide they are. Frozen and hashable.

    Whoever makes batches chooses it, and gives the same one to the model: the compiled program
    depends on it, and on nothing else of what is in a batch.
    """

    # every row starts with the vectors of one prompt in order, so many of them; a decoder-only
    # model then computes their keys and values once for all rows. 0 promises nothing
    shared_prefix_length: int = 0
    fine_buckets: bool = False  # lengths in steps of 16 up to 256: more shapes, less padding
    # widths at which examples that share rows are computed, each at the least that holds it; none
    # is longer than the last. Empty: each example has a row of its own
    packed_widths: tuple[int, ...] = ()
    examples_per_row: int = 1  # at most; each is then answered in a row of its own

    @property
    def max_packed_length(self) -> int:
        """The longest example that may share a row; 0 where none do."""
        return max(self.packed_widths, default=0)
