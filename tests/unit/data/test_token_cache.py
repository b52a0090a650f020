"""Ids on disk: found again for the same texts and tokenizer, never for others, never damaged."""

import numpy as np
import pytest
from helpers_text import word_tokenizer

from jaxprompt.data import examples, token_cache
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.token_cache import tokenized
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens

TEXTS = [" ".join(f"d{n}w{k}" for k in range(n % 4 + 1)) for n in range(20)]


class Counting(Tokenizer):
    """Counts the texts that it cuts."""

    def __init__(self, inner):
        super().__init__(inner)
        self.cut = []

    def encode_all(self, texts, *, trusted=False):
        if len(texts) > 1:  # its own questions are of one text
            self.cut.append(len(texts))
        return super().encode_all(texts, trusted=trusted)


@pytest.fixture
def counting(tmp_path_factory):
    words = sorted({word for text in TEXTS for word in text.split()} | {"spam", "ham"})
    folder = word_tokenizer(tmp_path_factory.mktemp("tokenizer"), words)
    return Counting(load_tokenizer(folder)._inner)


def test_the_same_texts_are_cut_once(counting, tmp_path):
    first = tokenized(TEXTS, counting, tmp_path)
    assert [first.at(n).tolist() for n in range(len(first))] == list(map(counting.encode, TEXTS))
    again = tokenized(TEXTS, counting, tmp_path)
    np.testing.assert_array_equal(first.ids, again.ids)
    np.testing.assert_array_equal(first.starts, again.starts)
    assert first.ids.dtype == again.ids.dtype and counting.cut == [20]
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"]


def test_anything_else_is_cut_again(counting, tmp_path, monkeypatch):
    tokenized(TEXTS, counting, tmp_path)
    tokenized([*TEXTS[:-1], TEXTS[-1] + " x"], counting, tmp_path)
    tokenized(TEXTS[::-1], counting, tmp_path)
    tokenized(TEXTS, counting, tmp_path, trusted=True)
    # the border between two texts, which a plain join would lose
    tokenized(["d1w0 d1w1\nd2w0", "d3w0"], counting, tmp_path)
    two = tokenized(["d1w0 d1w1", "d2w0\nd3w0"], counting, tmp_path)
    assert two.starts.tolist() == [0, 2, 4]
    monkeypatch.setattr(counting, "identity", lambda: "another tokenizer")
    tokenized(TEXTS, counting, tmp_path)
    assert counting.cut == [20, 20, 20, 20, 2, 2, 20]


def test_the_identity_of_a_tokenizer_tells_rules_that_the_vocabulary_does_not(counting):
    before = counting.identity()
    assert before == counting.identity()
    from tokenizers import normalizers

    counting._inner.backend_tokenizer.normalizer = normalizers.Replace("q", "p")
    assert counting.identity() != before


def test_parts_have_no_seam(counting, tmp_path, monkeypatch):
    whole = tokenized(TEXTS, counting, None)
    monkeypatch.setattr(token_cache, "CHUNK", 7)
    parts = tokenized(TEXTS, counting, tmp_path)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.starts, parts.starts)


@pytest.mark.parametrize("damage", ["cut short", "a bit", "other", "no text"])
def test_a_damaged_file_is_made_again(counting, tmp_path, damage):
    first = tokenized(TEXTS, counting, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    if damage == "cut short":
        file.write_bytes(good[: len(good) // 2])
    elif damage == "a bit":
        at = good.index(first.ids.tobytes())
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    elif damage == "other":
        np.savez(file, ids=first.ids[:-1], starts=first.starts)
    else:
        file.write_bytes(b"")
    again = tokenized(TEXTS, counting, tmp_path)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert counting.cut == [20, 20] and file.read_bytes() == good


def test_where_nothing_can_be_written_nothing_is_kept(counting, tmp_path):
    (tmp_path / "file").write_text("")
    found = tokenized(TEXTS, counting, tmp_path / "file" / "tokens")
    assert len(found) == 20 and sorted(f.name for f in tmp_path.iterdir()) == ["file"]


def test_the_folder_does_not_grow_without_end(counting, tmp_path):
    tokenized(TEXTS, counting, tmp_path)
    (first,) = tmp_path.iterdir()
    largest = 2 * first.stat().st_size
    for n in range(1, 4):
        tokenized(TEXTS[n:], counting, tmp_path, largest=largest)
        tokenized(TEXTS, counting, tmp_path, largest=largest)  # was used last, so it stays
    assert first.is_file() and len(list(tmp_path.iterdir())) == 2 and counting.cut.count(20) == 1


def test_nothing_is_removed_from_a_folder_without_a_bound(counting, tmp_path):
    (tmp_path / "own.npz").write_text("somebody's")
    for n in range(4):
        tokenized(TEXTS[n:], counting, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_large_tasks_use_the_cache_of_the_home(counting, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPROMPT_CACHE", str(tmp_path))
    task = resolve_task("spam")
    rows = [{"subject": "d1w0", "text": text, "label": "spam"} for text in TEXTS]
    tokenize_rows = lambda: tokenize(
        task, rows, counting, VirtualTokens(counting.size, 2), need_targets=False
    )
    first = tokenize_rows()
    assert not list(tmp_path.rglob("*.npz"))
    monkeypatch.setattr(examples, "CACHED_FROM", 10)
    tokenize_rows()
    cut = len(counting.cut)
    for a, b in zip(first, tokenize_rows(), strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
    assert len(list((tmp_path / "tokens").glob("*.npz"))) == 1
    assert 20 not in counting.cut[cut:]
