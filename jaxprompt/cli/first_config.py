"""A first config for a file of rows: which columns are text and label, what goes where, and why.

The guesses follow simple rules that a person can check, and each is told with its reason. What the
rules do not settle is refused with a sentence that names the option which does.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.overrides import read_yaml
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.holdout import FEWEST_ROWS, MOST_LABELS, hold_out
from jaxprompt.data.references import references
from jaxprompt.data.rows import Row, Rows, separator_hint
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.registry import TASKS, resolve_task
from jaxprompt.data.templates import as_text
from jaxprompt.runtime.files import check_output, write_atomically

LABEL_NAMES = (
    "label", "labels", "class", "category", "target", "answer", "intent", "sentiment", "topic",
    "tag", "type", "y", "output", "coarse_label", "label_text", "label_name",
)  # fmt: skip
TEXT_NAMES = (
    "text", "sentence", "question", "content", "review", "message", "body", "input", "document",
    "comment", "tweet", "utterance", "gloss", "description", "title", "subject",
)  # fmt: skip
LABEL_WORDS = 6  # words of the longest label
LOOKED_AT = 2000  # rows from which columns are judged
MOST_TOKENS = 256  # of a row: longer ones take long on a small machine
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


class InitRequest(NamedTuple):
    """What the user wants to have, and what may be left to guessing (None)."""

    data: Path
    output: Path
    text: Sequence[str] = ()  # columns
    label: str | None = None
    validation: Path | None = None
    test: Path | None = None
    backbone: str = "builtin"


class Columns(NamedTuple):
    """Which columns a config uses, and the reasons."""

    text: list[str]
    label: str
    reasons: list[str]


class Labels(NamedTuple):
    """The words that answers are chosen from; none: answers are written freely."""

    words: list[str]
    label_map: dict[str, str]  # value in the data -> word, where they differ
    reasons: str


class Files(NamedTuple):
    """The file of each split, the rows of those that have to be written, and the reasons."""

    paths: dict[str, Path]  # train, validation, and perhaps test
    to_write: dict[Path, Rows]
    reasons: list[str]


class Draft(NamedTuple):
    """A config with what has to be said about it."""

    text: str  # YAML with comments
    files: Files
    rows: dict[str, int]  # of each split
    reasons: list[str]


def draft_config(request: InitRequest) -> Draft:
    """Guess a config for the file ``request.data``. Nothing is written.

    Raises:
        UserError: something cannot be guessed, or the rows cannot be used.
    """
    rows = read_rows(None, str(request.data))
    if request.validation is None and len(rows) < FEWEST_ROWS:
        raise UserError(
            f"{request.data} has {len(rows)} rows, too few to cut validation rows off; give at "
            f"least {FEWEST_ROWS}, or a file with --validation."
        )
    columns = guess_columns(rows, str(request.data), request.text, request.label)
    files = place_rows(request, rows, columns)
    splits = {
        name: files.to_write[path] if path in files.to_write else _rows_of(path, request.data, rows)
        for name, path in files.paths.items()
    }
    labels = guess_labels(columns.label, splits)
    reasons = [*columns.reasons, labels.reasons, *files.reasons]
    length = guess_length(rows, columns.text)
    name = task_name(request.output)
    task = _task_values(name, columns, labels, files, length)
    text = render(task, request, reasons)
    _check(text, splits)
    return Draft(text, files, {name: len(part) for name, part in splits.items()}, reasons)


def write(draft: Draft, output: Path, *, force: bool = False) -> None:
    """Write the config and the files of its splits.

    Raises:
        UserError: one of them exists and ``force`` is not set, or it cannot be written. Nothing
            has been written then.
    """
    from jaxprompt.data.writers import write_rows

    targets = [output, *draft.files.to_write]
    for path in targets:
        if path.exists() and not force:
            raise UserError(
                f"There is {shown(str(path))} already; name another --output, or allow it to be "
                "replaced with --force."
            )
        check_output(path, [source for source in draft.files.paths.values() if source != path])
    for path, rows in draft.files.to_write.items():
        write_rows(path, rows)
    write_atomically(output, draft.text)


def _rows_of(path: Path, data: Path, rows: Rows) -> Rows:
    return rows if path == data else read_rows(None, str(path))


# -- columns ---------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """What the values of a column look like."""

    name: str
    values: list[str]  # as text, of rows that have one
    empty: int
    usable: bool  # all values are text or numbers

    @property
    def distinct(self) -> int:
        return len(set(self.values))

    @property
    def words(self) -> float:
        """The mean number of words of a value."""
        return sum(len(value.split()) for value in self.values) / max(len(self.values), 1)

    def like_classes(self) -> bool:
        """Whether few different short values come back again and again."""
        return (
            self.usable
            and self.empty * 10 <= len(self.values)  # a row without a label is told later
            and 2 <= self.distinct <= min(MOST_LABELS, max(len(self.values) // 3, 2))
            and max(len(value.split()) for value in self.values) <= LABEL_WORDS
            and not all(re.fullmatch(r"[-+]?\d+\.\d*[1-9]\d*", value) for value in self.values)
        )


def _described(rows: Rows) -> dict[str, _Column]:
    sample = list(itertools.islice(rows, LOOKED_AT))
    columns = {}
    for name in dict.fromkeys(name for row in sample for name in row):
        texts = [_text_or_none(row.get(name), name) for row in sample]
        values = [text for text in texts if text]
        usable = bool(values) and not any(isinstance(row.get(name), list | dict) for row in sample)
        columns[name] = _Column(name, values, len(sample) - len(values), usable)
    return columns


def _text_or_none(value: object, column: str) -> str | None:
    if value is None or isinstance(value, list | dict):
        return None
    try:
        return as_text(value, column)
    except UserError:
        return None


def guess_columns(
    rows: Rows, origin: str, text: Sequence[str] = (), label: str | None = None
) -> Columns:
    """The columns that hold text and label, where they are not named."""
    columns = _described(rows)
    for name in [*text, *([] if label is None else [label])]:
        if name not in columns:
            raise UserError(
                f"{origin} has no column {shown(name)}; it has {listed(map(repr, columns))}."
            )
    if label is not None and label in text:
        raise UserError(f"Column {label!r} cannot be both text and label; name two columns.")
    reasons = []
    if label is None:
        label, reason = _guess_label(columns, origin, text)
        reasons.append(f"label: column {label!r}, because {reason} (--label names another)")
    guessed = not text
    if guessed:
        text, reason = _guess_text(columns, origin, label)
        text, without = _without_empty_cells(rows, text)
        reasons += without
        if len(text) == 1 and without:
            reason = "it has text in every row"
        names = f"column{'s' * (len(text) > 1)} {' and '.join(map(repr, text))}"
        reasons.insert(0, f"text: {names}, because {reason} (--text names another)")
    _check_cells(rows, [*text, label], origin)
    for name in text:
        if set(name) & set("{}"):
            raise UserError(f"Column {name!r} has braces in its name; rename it in {origin}.")
    return Columns(list(text), label, reasons)


def _empty_cells(rows: Rows, name: str) -> list[int]:
    """Numbers (from 1) of the rows whose cell is empty; training would refuse each of them."""
    return [number for number, row in enumerate(rows, 1) if row.get(name) is None]


def _without_empty_cells(rows: Rows, text: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of several columns those that are full, and a sentence on each of the others."""
    empty = {name: len(_empty_cells(rows, name)) for name in text}
    full = [name for name in text if not empty[name]]
    if not full:  # there is nothing to choose among
        return list(text), []
    return full, [
        f"not text: column {name!r}, because {count} of its cells are empty (fill them, and use "
        f"--text {name})"
        for name, count in empty.items()
        if count
    ]


def _check_cells(rows: Rows, names: Sequence[str], origin: str) -> None:
    for name in names:
        empty = _empty_cells(rows, name)
        if empty:
            raise UserError(
                f"Column {name!r} of {origin} is empty in {len(empty)} of {len(rows)} rows, first "
                f"in row {empty[0]}; fill these cells, or leave the rows out."
            )


def _guess_label(
    columns: Mapping[str, _Column], origin: str, text: Sequence[str]
) -> tuple[str, str]:
    classes = {name: c for name, c in columns.items() if name not in text and c.like_classes()}
    named = [name for name in classes if name.strip().lower() in LABEL_NAMES]
    words = [name for name in named if not _all_numbers(classes[name].values)]
    if len(named) > 1 and len(words) == 1:
        others = " and ".join(repr(name) for name in named if name != words[0])
        return words[0], f"it has the words of {others}"
    if len(named) == 1 or (not named and len(classes) == 1):
        name = (named or list(classes))[0]
        reason = f"{classes[name].distinct} different values come back in it"
        return name, f"of its name, and {reason}" if named else reason
    several = named or list(classes)
    if several:
        raise UserError(
            f"{origin} has several columns that may be the label: {listed(map(repr, several))}; "
            f"name one, as in --label {several[0]}."
        )
    raise UserError(
        f"{origin} has no column that looks like a label: few values that come back in many rows; "
        f"it has {listed(map(repr, columns))}{separator_hint(list(columns))}; name one with "
        "--label."
    )


def _all_numbers(values: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[-+]?\d+", value) for value in values)


def _guess_text(columns: Mapping[str, _Column], origin: str, label: str) -> tuple[list[str], str]:
    texts = {
        name: column
        for name, column in columns.items()
        if name != label and column.usable and not column.like_classes()
        and not all(re.fullmatch(r"[-+.\d:eE /]*", value) for value in column.values)
    }  # fmt: skip
    long = [name for name, column in texts.items() if column.words >= 2]
    if len(long) == 1:
        reason = f"it has {texts[long[0]].words:.0f} words a row, and no other column has text"
        return long, reason
    if len(long) in (2, 3):
        return long, "both have text" if len(long) == 2 else "they have text"
    if len(texts) == 1:
        return list(texts), "no other column has text"
    by_name = {name.strip().lower(): name for name in long or texts}
    named = [by_name[name] for name in TEXT_NAMES if name in by_name]
    if named:
        return named[:1], "of its name"
    if texts:
        raise UserError(
            f"{origin} has several columns that may be the text: {listed(map(repr, texts))}; name "
            f"one, or several, as in --text {next(iter(texts))}."
        )
    raise UserError(
        f"{origin} has no column of text beside the label {label!r}; name one with --text."
    )


# -- labels ----------------------------------------------------------------------------------------


def guess_labels(column: str, splits: Mapping[str, Rows]) -> Labels:
    """Label words from the values in the column, of all splits.

    Raises:
        UserError: a row has no value, or there is one value only.
    """
    counts: Counter[str] = Counter()
    for split, rows in splits.items():
        for number, row in enumerate(rows, 1):
            counts[as_text(row.get(column), column, f"row {number} of the {split} rows")] += 1
    if len(counts) < 2:
        raise UserError(
            f"Column {column!r} has the value {shown(next(iter(counts)))} in every row, so there "
            "is nothing to learn; name another with --label."
        )
    if len(counts) > MOST_LABELS:
        return Labels(
            [], {}, f"labels: none, because column {column!r} has {len(counts)} different values, "
            "so answers are written freely",
        )  # fmt: skip
    numbers = _all_numbers(list(counts))
    values = sorted(counts, key=int) if numbers else [v for v, _ in counts.most_common()]
    most, count = counts.most_common(1)[0]
    summary = f"the most frequent, {most!r}, has {count / counts.total():.0%} of the rows"
    if not numbers:
        return Labels(
            values, {}, f"labels: the {len(values)} words of column {column!r}; {summary}"
        )
    words = {v: _number_word(v) for v in values}
    return Labels(
        list(words.values()), words,
        f"labels: column {column!r} has {len(values)} numbers, which stand for words that only you "
        f"know; replace the words in labels and label_map; {summary}",
    )  # fmt: skip


def _number_word(value: str) -> str:
    number = int(value)
    if 0 <= number < len(NUMBER_WORDS):
        return NUMBER_WORDS[number]
    return f"minus {-number}" if number < 0 else f"number {number}"


def guess_length(rows: Rows, text: Sequence[str]) -> int:
    """Tokens that nearly all rows have at most, from their words; a multiple of 32."""
    sample = itertools.islice(rows, LOOKED_AT)
    sizes = sorted(
        sum(len(re.findall(r"\w+|[^\w\s]", str(row.get(name) or ""))) for name in text)
        for row in sample
    )
    size = 1.6 * sizes[int(0.98 * (len(sizes) - 1))] + 8
    return min(MOST_TOKENS, max(64, -32 * int(-size // 32)))


# -- splits ----------------------------------------------------------------------------------------


def place_rows(request: InitRequest, rows: Rows, columns: Columns) -> Files:
    """Which file each split is read from. Splits that the user does not give are cut off."""
    given = {"train": request.data, "validation": request.validation, "test": request.test}
    paths = {name: path for name, path in given.items() if path is not None}
    needed = [*columns.text, columns.label]
    for path in paths.values():
        first = rows[0] if path == request.data else read_rows(None, str(path))[0]
        missing = [name for name in needed if name not in first]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}; it has {listed(map(repr, first))}."
            )
    if request.validation is not None:
        summary = " and ".join(f"{name} {path}" for name, path in paths.items())
        return Files(paths, {}, [f"splits: as named, {summary}"])
    names = ["train", "validation", *(["test"] if request.test is None else [])]
    parts = split_rows(rows, columns, names, str(request.data))
    beside = request.output.with_suffix("")
    written = {
        name: beside.with_name(f"{beside.name}-{name}{request.data.suffix.lower()}")
        for name in names
    }
    summary = ", ".join(f"{len(parts[name])} {name}" for name in names)
    reason = (
        f"splits: {request.data} is cut into {summary} rows, by a hash of the text: the same in "
        "every call, all labels in each, no text in two (--validation and --test name files)"
    )
    both = paths | written
    return Files(
        {name: both[name] for name in SPLITS if name in both},
        {written[name]: parts[name] for name in names},
        [reason],
    )


def split_rows(
    rows: Rows, columns: Columns, names: Sequence[str], origin: str
) -> dict[str, list[Row]]:
    """Parts of the rows as ``hold_out`` makes them. Raises UserError where one is empty."""
    parts = hold_out(rows, columns.text, [columns.label], names)
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"{origin} has too few rows of each label to cut {name} rows off; give a file "
                f"with --{name if name != 'train' else 'validation'}."
            )
    return parts


# -- the file --------------------------------------------------------------------------------------


def task_name(output: Path) -> str:
    """A name for the task, from the config's: that of a folder, and not one of the built-in."""
    name = re.sub(r"[^\w.+-]+", "-", output.stem).strip("-.+") or "task"
    return f"my-{name}"[:100] if name in TASKS or not re.match(r"\w", name) else name[:100]


def _task_values(
    name: str, columns: Columns, labels: Labels, files: Files, length: int
) -> dict[str, object]:
    one = len(columns.text) == 1
    template = " ".join(f"{{{c}}}" if one else f"{c}: {{{c}}}" for c in columns.text)
    values: dict[str, object] = {"name": name}
    values |= {split: str(path) for split, path in files.paths.items()}
    values |= {"template": template, "target": f"{{{columns.label}}}"}
    if labels.words:
        values |= {"labels": labels.words}
        values |= {"label_map": labels.label_map} if labels.label_map else {}
        values |= {"metrics": ["accuracy", "macro_f1"]}
    else:
        values |= {"metrics": ["exact_match", "token_f1"]}
    return values | {"max_input_length": length}


COMMENTS = {
    "train": "paths start from the directory that the command runs in",
    "template": "columns in braces",
    "labels": "the answer is the likeliest of these words",
    "label_map": "value in the data: word",
    "metrics": "the first selects the best prompt",
    "max_input_length": "tokens of a row; longer rows are cut, and it is said how many",
}


def render(task: Mapping[str, object], request: InitRequest, reasons: Sequence[str]) -> str:
    """The config as YAML with comments."""
    start = "class_labels" if "labels" in task else "sampled_vocabulary"
    command = f"jaxprompt train {request.output}"
    lines = [
        f"# {command}              (--dry-run checks all and writes nothing)",
        f"# Made by `jaxprompt init {request.data}`, which guessed:",
        *(f"# - {' '.join(reason.split())}" for reason in reasons),
        "",
        f"backbone: {_scalar(request.backbone)}  # `jaxprompt backbones` lists others",
        "task:",
    ]
    for key, value in task.items():
        comment = f"  # {COMMENTS[key]}" if key in COMMENTS else ""
        if isinstance(value, dict):
            lines.append(f"  {key}:{comment}")
            lines += [f"    {_scalar(k)}: {_scalar(v)}" for k, v in value.items()]
        elif isinstance(value, list):
            lines.append(f"  {key}: [{', '.join(map(_scalar, value))}]{comment}")
        else:
            lines.append(f"  {key}: {_scalar(value)}{comment}")
    lines += [
        "prompt:",
        "  length: 100  # vectors; fewer learn less: 20 are often too few",
        f"  init: {start}",
        "train:",
        "  steps: 1000  # more help where the metric still rises at the end",
        "  batch_size: 32",
        "  length_bucketing_window: 16  # rows of similar length share a batch",
        "  learning_rate: 0.3",
        "  schedule: linear  # falls to 0 at the last step",
        "  evaluate_every: 100",
        "  checkpoint_every: 100",
        "  seed: 0",
        f"output: {_scalar('runs/' + str(task['name']))}",
    ]
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A value as YAML: plain where that is safe, else in double quotes."""
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and read_yaml(text, "it") == text:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _check(text: str, splits: Mapping[str, Rows]) -> None:
    """Refuse a config that training would refuse: its keys, and the rows of every split."""
    run = parse(RunConfig, read_yaml(text, "the config"))
    task = resolve_task(run.task)
    for name, rows in splits.items():
        references(task, rows, f"the {name} rows")
