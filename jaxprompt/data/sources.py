"""Rows by name: packaged sets, local files, Hugging Face datasets, TFDS. A row is a dict."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprompt.config import UserError

Row = dict[str, Any]
PACKAGED = Path(__file__).parent.parent / "builtin" / "data"


def read_rows(source: str | None, split: str) -> Sequence[Row]:
    """Rows of ``split``: a file where ``source`` is None, else a split of the source.

    Sources: ``builtin:NAME``, ``hf:DATASET[/CONFIG]`` (``hf:namespace/name/config`` for names with a
    namespace, ``hf:namespace/name`` otherwise), ``tfds:NAME[/CONFIG]``.
    """
    kind, colon, name = (source or "").partition(":")
    if source is None:
        rows = _read_file(Path(split))
    elif kind == "builtin" and colon:
        rows = _read_packaged(name, split)
    elif kind == "hf" and colon:
        rows = _read_hugging_face(name, split)
    elif kind == "tfds" and colon:
        rows = _read_tfds(name, split)
    else:
        raise UserError(
            f"Source {source!r} is unknown; use builtin:NAME, hf:DATASET[/CONFIG], tfds:NAME, or "
            "give files in train and validation."
        )
    if len(rows) == 0:
        raise UserError(f"{split if source is None else f'{source} {split}'} holds no rows.")
    return rows


def _read_file(path: Path) -> Sequence[Row]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv,
               ".parquet": _read_parquet}  # fmt: skip
    if path.suffix not in readers:
        raise UserError(f"File {str(path)!r} must end in {', '.join(readers)}.")
    if not path.is_file():
        raise UserError(f"There is no file {str(path)!r}.")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from None


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object, found {line[:40]!r}.")
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        header = next(reader, None)
        if header is None:
            return []
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, and the header has "
                    f"{len(header)}; quote cells that contain separators or line breaks."
                )
            rows.append(dict(zip(header, cells, strict=True)))
        return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as parquet: {problem}") from None


def _read_packaged(name: str, split: str) -> list[Row]:
    path = PACKAGED / name / f"{split}.parquet"
    if not path.is_file():
        sets = sorted(p.name for p in PACKAGED.iterdir() if p.is_dir())
        raise UserError(
            f"There is no built-in split {name}/{split}; sets are {', '.join(sets)}, with splits "
            "train, validation and test."
        )
    return _read_parquet(path)


def _read_hugging_face(name: str, split: str) -> Sequence[Row]:
    import datasets

    parts = name.split("/")
    # a lone slash is ambiguous: super_glue/boolq is a configuration, google/boolq is a namespace
    tries = [(name, None)] if len(parts) == 1 else [("/".join(parts[:-1]), parts[-1])]
    if len(parts) == 2:
        tries.append((name, None))
    problems = []
    for dataset, config in tries:
        try:
            loaded = datasets.load_dataset(dataset, config, split=split)
            return loaded  # pyright: ignore[reportReturnType]
        except Exception as error:  # datasets and its hub client raise dozens of unrelated types
            problems.append(" ".join(str(error).split())[:160])
    raise UserError(
        f"Hugging Face dataset {name!r}, split {split!r}, cannot be loaded ({problems[0]}); check "
        "the name and the network, or give local files in train and validation."
    )


def _read_tfds(name: str, split: str) -> Sequence[Row]:
    import tensorflow_datasets as tfds

    try:
        return _Decoded(tfds.data_source(name, split=split))
    except ImportError as error:
        raise UserError(
            f"TFDS data set {name!r} needs {error.name!r} to be read without TensorFlow; "
            f"run: pip install {error.name}."
        ) from None
    except Exception as error:  # likewise
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"TFDS data set {name!r}, split {split!r}, cannot be read ({problem}); prepare it with "
            "file_format='array_record' (tfds build), or give local files."
        ) from None


class _Decoded(Sequence[Row]):
    """A TFDS source whose byte strings are text."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return {key: _text(value) for key, value in self._source[index].items()}


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):
        return _text(value.tolist())
    return [_text(item) for item in value] if isinstance(value, list) else value
