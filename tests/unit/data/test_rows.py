"""Rows that are made when they are asked for are a sequence like any other."""

import pytest

from jaxprompt.data.rows import IndexedRows, LazyRows


class Squares(LazyRows):
    def __len__(self):
        return 5

    def row(self, number):
        return {"square": number**2}


class Library:
    """A data set of a library: it has rows by number, and is no ``Sequence``."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index >= 2:
            raise IndexError(index)
        return {"text": "ab"[index]}


def test_lazy_rows_have_numbers_slices_and_an_end():
    whole = [{"square": n} for n in (0, 1, 4, 9, 16)]
    rows = Squares()
    assert list(rows) == whole and list(reversed(rows)) == whole[::-1]
    assert rows[-1] == whole[-1] and rows[1:4:2] == whole[1:4:2] and whole[2] in rows
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            rows[beyond]


def test_rows_of_a_library_become_a_sequence():
    rows = IndexedRows(Library())
    assert list(rows) == [{"text": "a"}, {"text": "b"}] and rows[-1] == {"text": "b"}
    assert rows[:1] == [{"text": "a"}] and len(rows) == 2
