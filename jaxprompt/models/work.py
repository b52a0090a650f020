"""The shape of what a device computes at a time."""

from typing import NamedTuple


class Work(NamedTuple):
    """Rows and positions of a part of a batch."""

    rows: int  # of a part of a batch
    parts: int  # of a batch
    inputs: int  # positions of a row, prompt included
    targets: int
