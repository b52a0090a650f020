"""Rows that are longer than a task allows: which columns are cut, and what is lost.

A row is cut at its end, unless ``task.truncate`` names columns that are cut before that.
``Truncation`` counts the cuts, and callers report them to the user.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.jinja_templates import cut_columns
from jaxprompt.data.rows import Row, Rows
from jaxprompt.data.templates import Piece, as_text, input_columns, places_of

Parts = list[np.ndarray]  # ids of each text between a row's virtual tokens
Encode = Callable[[Rows, Sequence[Piece]], list[Parts]]
_MOST_ROUNDS = 64  # of a search; every second one halves what is left


class Truncation(NamedTuple):
    """How many rows were cut when they were tokenized."""

    rows: int  # in all
    cut: int  # rows that had too many tokens
    lost: dict[str, int]  # column -> rows in which nothing of it is left

    def sentence(self, rows: str, limit: str) -> str | None:
        """A sentence for the user; None if nothing was cut.

        Args:
            rows: what the rows are called, such as "validation rows".
            limit: name and value of the limit.
        """
        if not self.cut:
            return None
        text = f"{self.cut} of {self.rows} {rows} are longer than {limit} tokens, and are cut"
        lost = self.lost.items()
        gone = [f"in {count} of them nothing is left of {name!r}" for name, count in lost]
        return "; ".join([text, *gone])


def of_task(truncation: Truncation, task: TaskConfig, rows: str = "rows") -> str | None:
    """A sentence on the rows of a task, with the fix; None if nothing was cut."""
    summary = truncation.sentence(rows, f"task.max_input_length, {task.max_input_length}")
    if summary is None:
        return None
    hint = "" if task.truncate else ", or name in task.truncate what may be cut before the rest"
    return f"{summary}; raise it{hint}"


def columns_to_cut(task: TaskConfig) -> list[str]:
    """The columns of ``task.truncate``, in order; UserError if the template lacks one of them."""
    named = cut_columns(task)
    columns = input_columns(task, all_of_jinja=True)
    for name in named:
        if name not in columns:
            raise UserError(
                f"task.truncate names {name!r}, which the template {task.template!r} does not; it "
                f"has {listed(map(repr, columns))}."
            )
    return named


def fit(
    task: TaskConfig,
    rows: Rows,
    sizes: Sequence[int] | np.ndarray,
    pieces: Sequence[Piece],
    room: int,
    encode: Encode,
    whole: Callable[[int], Parts],
) -> tuple[dict[int, Parts], Truncation]:
    """Shorten the columns of ``task.truncate`` in rows that have more than ``room`` ids.

    Args:
        sizes: ids of each row.
        encode: ``encode(rows, pieces)`` gives the ids of rows with these pieces of a template.
        whole: ``whole(number)`` gives the ids of one uncut row, with ``pieces``.

    Returns:
        Ids of the rows that were too long, by number, after their columns were shortened, and what
        was cut. The caller cuts a row that is still too long at its end.
    """
    columns = columns_to_cut(task)
    long = np.flatnonzero(np.asarray(sizes) > room).tolist()
    if not long:
        return {}, Truncation(len(rows), 0, {})
    originals = [rows[number] for number in long]
    short, ids = list(originals), [whole(number) for number in long]
    for column in columns:
        over = [i for i, row_ids in enumerate(ids) if _size(row_ids) > room]
        above = [_size(ids[i]) for i in over]
        cut = _shorten([short[i] for i in over], above, column, room, lambda x: encode(x, pieces))
        for i, (row, row_ids) in zip(over, cut, strict=True):
            short[i], ids[i] = row, row_ids
    lost = _count_emptied_columns(originals, short, ids, pieces, room, encode)
    return dict(zip(long, ids, strict=True)), Truncation(len(rows), len(long), lost)


def _size(parts: Parts) -> int:
    return sum(map(len, parts))


def _shorten(
    rows: list[Row],
    above: list[int],
    column: str,
    room: int,
    encode: Callable[[Rows], list[Parts]],
) -> list[tuple[Row, Parts]]:
    """Each row with the longest beginning of the column that fits, and its ids.

    The search runs for all rows together. For each it has a length that fits, and one that does
    not, which has ``above`` ids. The next length comes from linear interpolation between the two,
    and every second time from their middle.
    """
    texts = [as_text(row[column], column) for row in rows]
    best = encode([{**row, column: ""} for row in rows])
    fits, fails = [0] * len(rows), [len(text) for text in texts]
    for turn in range(_MOST_ROUNDS):
        room_left = [
            _size(row_ids) < room and fails[i] - fits[i] > 1 for i, row_ids in enumerate(best)
        ]
        open_ = [i for i, more in enumerate(room_left) if more]
        if not open_:
            break
        tries = []
        for i in open_:
            low, width = _size(best[i]), fails[i] - fits[i]
            share = 0.5 if turn % 2 else (room - low) / max(above[i] - low, 1)
            tries.append(fits[i] + min(max(int(width * share), 1), width - 1))
        candidates = [{**rows[i], column: texts[i][:k]} for i, k in zip(open_, tries, strict=True)]
        for i, k, row_ids in zip(open_, tries, encode(candidates), strict=True):
            if _size(row_ids) <= room:
                fits[i], best[i] = k, row_ids
            else:
                fails[i], above[i] = k, _size(row_ids)
    shortened = [{**row, column: text[:k]} for row, text, k in zip(rows, texts, fits, strict=True)]
    return list(zip(shortened, best, strict=True))


def _count_emptied_columns(
    originals: list[Row],
    rows: list[Row],
    ids: list[Parts],
    pieces: Sequence[Piece],
    room: int,
    encode: Encode,
) -> dict[str, int]:
    """For each column, the number of rows that have lost all of its text."""
    left: list[set[str]] = [set() for _ in rows]  # columns of each row that are not lost
    open_ = list(range(len(rows)))
    places = places_of(pieces)
    for number, (_, before) in reversed(list(enumerate(places))):
        # if a column begins within the room, so do all columns before it
        over = [i for i in open_ if _size(ids[i]) > room]
        sizes = dict.fromkeys(open_, 0)
        if over:
            heads = encode([rows[i] for i in over], before)
            sizes |= {i: _size(row_ids) for i, row_ids in zip(over, heads, strict=True)}
        for i in open_:
            if sizes[i] < room:
                left[i] |= {name for name, _ in places[: number + 1]}
        open_ = [i for i in open_ if sizes[i] >= room]
    counts: collections.Counter[str] = collections.Counter()
    for original, row, names in zip(originals, rows, left, strict=True):
        for column in dict.fromkeys(name for name, _ in places):
            kept = column in names and as_text(row[column], column).strip()
            counts[column] += bool(as_text(original[column], column).strip() and not kept)
    return {column: count for column, count in counts.items() if count}
