"""Rows by name: packaged sets, local files, Hugging Face datasets, TFDS. A row is a dict."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.data.csv_file import read_csv
from jaxprompt.data.json_lines import read_jsonl
from jaxprompt.data.parquet_file import read_parquet
from jaxprompt.data.rows import IndexedRows, Row, Rows, plain_value

PACKAGED = Path(__file__).parent.parent / "builtin" / "data"


def read_rows(source: str | None, split: str, *, empty: bool = False) -> Rows:
    """Rows of ``split``: a file where ``source`` is None, else a split of the source.

    Sources: ``builtin:NAME``; ``folder:PATH``, whose files are named by splits, as SuperGLUE's own
    ``BoolQ/val.jsonl`` is; ``hf:DATASET[/CONFIG]``, where DATASET may have a namespace, as in
    ``hf:nyu-mll/glue/sst2``; ``tfds:NAME[/CONFIG]``.

    Args:
        empty: There may be no rows.

    Raises:
        UserError: The source is unknown or cannot be read, or has no rows.
    """
    kind, colon, name = (source or "").partition(":")
    if source is None:
        rows = _read_file(Path(expanded(split)))
    elif kind == "builtin" and colon:
        rows = _read_packaged(name, split)
    elif kind == "memory" and name:
        raise UserError(
            f"The {split} rows were given to jp.train by a Python program (memory:{name[:12]}...), "
            "and are not on disk; give them again, as data=, or name a file."
        )
    elif kind == "folder" and name:
        rows = _read_folder(Path(expanded(name)), split)
    elif kind == "hf" and colon:
        rows = _read_hugging_face(expanded(name), split)
    elif kind == "tfds" and colon:
        rows = _read_tfds(name, split)
    else:
        raise UserError(
            f"Source {shown(source)} is unknown; use builtin:NAME, folder:PATH, "
            "hf:DATASET[/CONFIG], tfds:NAME, or give files in train and validation."
        )
    if len(rows) == 0 and not empty:
        raise UserError(f"{split if source is None else f'{source} {split}'} holds no rows.")
    return rows


def _read_folder(folder: Path, split: str) -> Rows:
    if not folder.is_dir():
        raise UserError(f"There is no folder {shown(str(folder))}{looked_in(folder)}.")
    names = (split, "val", "dev") if split == "validation" else (split,)
    for name in names:
        for suffix in _readers():
            if (folder / f"{name}{suffix}").is_file():
                return _read_file(folder / f"{name}{suffix}")
    raise UserError(
        f"{folder} has no file for the split {shown(split)}; it would be called "
        f"{' or '.join(names)}, and end in {', '.join(_readers())}."
    )


def _readers() -> dict[str, Callable[[Path], Rows]]:
    """How each kind of file is read."""
    return {
        ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet
    }  # fmt: skip


def check_file(path: Path, whose: str = "") -> None:
    """Refuse a data file that is not there, and say where it was looked for."""
    if not path.is_file():
        raise UserError(f"There is no file {shown(str(path))}{whose}{looked_in(path)}.")


def _read_file(path: Path) -> Rows:
    readers, suffix = _readers(), path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"File {shown(str(path))} must end in {', '.join(readers)}.")
    check_file(path)
    try:
        return readers[suffix](path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it to UTF-8.") from None


def _read_packaged(name: str, split: str) -> Rows:
    path = PACKAGED / name / f"{split}.parquet"
    if not path.is_file():
        sets = sorted(p.name for p in PACKAGED.iterdir() if p.is_dir())
        raise UserError(
            f"There is no built-in split {name}/{split}; sets are {', '.join(sets)}, with splits "
            "train, validation and test."
        )
    return read_parquet(path)


def _read_hugging_face(name: str, split: str) -> Rows:
    if Path(name).is_dir():  # a folder of files that the library can read
        return _load_dataset([(name, None)], split)
    parts = name.split("/")
    # a lone slash is ambiguous: super_glue/boolq is a configuration, google/boolq is a namespace
    tries: list[tuple[str, str | None]] = (
        [(name, None)] if len(parts) == 1 else [("/".join(parts[:-1]), parts[-1])]
    )
    if len(parts) == 2:
        tries.append((name, None))
    return _load_dataset(tries, split)


def _load_dataset(tries: Sequence[tuple[str, str | None]], split: str) -> Rows:
    import datasets

    problems = []
    for dataset, config in tries:
        try:
            loaded = datasets.load_dataset(dataset, config, split=split)
            return IndexedRows(loaded)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # datasets and its hub client raise dozens of unrelated types
            problems.append(" ".join(str(error).split())[:160])
    name = "/".join(filter(None, tries[0]))
    raise UserError(
        f"Hugging Face dataset {name!r}, split {split!r}, cannot be loaded ({problems[0]}); check "
        "the name and the network, or give local files in train and validation."
    )


def _read_tfds(name: str, split: str) -> Rows:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, read_only_builder

    try:
        # files first: they need no TensorFlow, and the code of super_glue does even to read them
        plain, options = naming.parse_builder_name_kwargs(name)
        builder = read_only_builder.builder_from_files(str(plain), **options)
        return _Decoded(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
    except tfds.core.DatasetNotFoundError:
        pass
    except Exception as error:  # TFDS raises many unrelated types
        raise _unreadable(name, split, error) from None
    for group in ("text", "question_answering", "summarization", "translate"):
        # without TensorFlow a data set such as glue is known only once its group is imported
        importlib.import_module(f"tensorflow_datasets.{group}")
    try:
        return _Decoded(tfds.data_source(name, split=split))  # pyright: ignore[reportArgumentType]
    except ImportError as error:
        package = (error.name or "tensorflow").partition(".")[0]
        raise UserError(
            f"TFDS data set {name!r} is not prepared yet, and TFDS needs {package!r} for that; "
            f"run 'pip install {package}', or prepare it elsewhere with 'tfds build {name} "
            "--file_format=array_record' and set TFDS_DATA_DIR to the folder that holds it."
        ) from None
    except Exception as error:
        raise _unreadable(name, split, error) from None


def _unreadable(name: str, split: str, error: Exception) -> UserError:
    # the first line: after it comes a list of all data sets
    problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(
        f"TFDS data set {name!r}, split {split!r}, cannot be read ({problem}); prepare it once "
        f"where TensorFlow is installed with 'tfds build {name} --file_format=array_record', and "
        "set TFDS_DATA_DIR to the folder that holds it."
    )


class _Decoded(IndexedRows):
    """A TFDS source whose byte strings are text."""

    def __iter__(self) -> Iterator[Row]:
        # the source raises ValueError at its end, and not IndexError
        return map(self.row, range(len(self)))

    def row(self, number: int) -> Row:
        return {key: plain_value(value) for key, value in self._source[number].items()}
