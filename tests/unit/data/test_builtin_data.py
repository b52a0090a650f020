"""The built-in data sets: what PROVENANCE.md promises about them."""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import jaxprompt

DATA = Path(jaxprompt.__file__).parent / "builtin" / "data"
SPLITS = ("train", "validation", "test")
KINDS = {"object", "person", "animal", "plant", "food", "place"}


@cache
def read(name: str, split: str) -> list[dict[str, str]]:
    return pq.read_table(DATA / name / f"{split}.parquet").to_pylist()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|0", re.sub(r"\d+", "0", text.lower()))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "name, columns, labels, low, high",
    [
        ("supersense", {"gloss", "label"}, KINDS, 0.2, 0.3),
        ("spam", {"subject", "text", "label"}, {"ham", "spam"}, 0.65, 0.85),
    ],
)
def test_columns_labels_and_majority_share(name, columns, labels, low, high, split):
    rows = read(name, split)
    assert set(rows[0]) == columns
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == labels
    assert low < max(counts.values()) / len(rows) < high


@pytest.mark.parametrize("name", ["supersense", "spam"])
def test_sizes_are_those_that_provenance_states(name):
    stated = re.findall(rf"\| {name} \| (\w+) \| (\d+) \|", (DATA / "PROVENANCE.md").read_text())
    assert {split: int(n) for split, n in stated} == {s: len(read(name, s)) for s in SPLITS}


def test_files_are_small_and_the_licence_is_with_them():
    assert sum(path.stat().st_size for path in DATA.rglob("*.parquet")) < 6e6
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (
        (DATA / "LICENSE-wordnet.txt").read_text()
    )


@pytest.mark.parametrize(
    "name, column, size, overlap", [("supersense", "gloss", 2, 0.5), ("spam", "text", 3, 0.4)]
)
def test_no_text_is_nearly_another_one(name, column, size, overlap):
    texts = [row[column] for split in SPLITS for row in read(name, split)]
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sets = []
    for row, text in enumerate(texts):
        run = words(text)
        own = {tuple(run[i : i + size]) for i in range(max(1, len(run) - size + 1))}
        # Runs that hundreds of texts share ("of the") only slow the count down: they count as
        # shared with everybody, so a pair is missed only if it has nothing else in common.
        common = sum(len(index[one]) > 200 for one in own)
        shared = Counter(o for one in own if len(index[one]) <= 200 for o in index[one])
        for other, n in shared.items():
            if n + common >= overlap * len(own):
                union = len(own | sets[other])
                assert len(own & sets[other]) < overlap * union, (text, texts[other])
        for one in own:
            index[one].append(row)
        sets.append(own)
    assert len({tuple(words(text)) for text in texts}) == len(texts)


def test_glosses_are_definitions_only():
    for split in SPLITS:
        for row in read("supersense", split):
            assert '"' not in row["gloss"] and not row["gloss"].startswith("(")
            assert len(words(row["gloss"])) >= 3


def test_mails_hold_no_addresses_links_or_markup():
    for split in SPLITS:
        for row in read("spam", split):
            both = row["subject"] + "\n" + row["text"]
            assert (
                re.search(r"\w@\w+\.\w|https?://\w|DeathToSpam|(?i:<(html|body|table)\b)", both)
                is None
            )
            assert "  " not in both and len(row["text"]) <= 1200 and len(words(row["text"])) >= 8
