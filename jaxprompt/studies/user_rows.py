"""Rows of users for a study: entries of Debian's changelogs on this machine, by author.

The question is a habit of writing: does the author end the first point of an entry with a stop?
The input is that point without it, so the text says little and whose it is says much. Authors are
people: rows stay in the output of the study, with a hash in place of the author, and nothing of
them is in its report but counts and scores. Each changelog has the licence of its package.
"""

import email.utils
import gzip
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxprompt.config.errors import UserError
from jaxprompt.data.rows import Row

CHANGELOGS = Path("/usr/share/doc")
LABELS = ["yes", "no"]
_ENTRY = re.compile(
    r"^(\S+) \(([^)]+)\) [^;\n]+;[^\n]*\n(.*?)^ -- [^<\n]*<([^>\n]*)>  ([^\n]*)$", re.S | re.M
)
_LONGEST = 100  # characters of a text
_SHORTEST = 8


def changelog_rows(folder: Path = CHANGELOGS) -> list[Row]:
    """A row for each entry: user, time, text and label, in order of time."""
    rows, seen = [], set()
    for file in sorted(folder.glob("*/changelog*.gz")):
        for package, version, points, author, date in _entries(file):
            if (package, version) in seen:  # packages of one source have one changelog
                continue
            seen.add((package, version))
            row = _row(points, author, date)
            if row is not None:
                rows.append(row)
    return sorted(rows, key=lambda row: row["when"])


def _entries(file: Path) -> Iterator[tuple[str, ...]]:
    try:
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
    except (OSError, EOFError, gzip.BadGzipFile):
        return
    for match in _ENTRY.finditer(text):
        yield match.groups()


def _row(points: str, author: str, date: str) -> Row | None:
    _, *parts = re.split(r"^  \* ", points, flags=re.M)
    try:
        when = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None
    if not parts:
        return None
    first = " ".join(parts[0].split("\n\n")[0].split())
    first = re.sub(r"\s*\(?\s*closes:?.*$|\s*\[.*$", "", first, flags=re.I).strip()
    text = first.rstrip(" .;,:")[:_LONGEST]
    if len(text) < _SHORTEST:
        return None
    user = hashlib.sha256(author.strip().lower().encode()).hexdigest()[:12]
    label = LABELS[0] if first.endswith(".") else LABELS[1]
    return {"user": user, "when": when, "text": text, "label": label}


def some_users(rows: list[Row], count: int, fewest: int, most: int) -> list[Row]:
    """The latest ``most`` rows of ``count`` users: from those with most rows to ``fewest``.

    Raises:
        UserError: there are too few users.
    """
    every: dict[str, list[Row]] = {}
    for row in rows:
        every.setdefault(str(row["user"]), []).append(row)
    able: Mapping[str, list[Row]] = {u: own for u, own in every.items() if len(own) >= fewest}
    if len(able) < count:
        raise UserError(
            f"{CHANGELOGS} has changelogs of {len(able)} authors with {fewest} entries or more, "
            f"and the study needs {count}; run it on a Debian system with their documents."
        )
    by_size = sorted(able, key=lambda user: (-len(able[user]), user))
    places = [round(i * (len(by_size) - 1) / (count - 1)) for i in range(count)]
    return [row for place in places for row in able[by_size[place]][-most:]]
