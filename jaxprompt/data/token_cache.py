"""Ids of texts, kept on disk under a digest of the tokenizer and the texts.

Nothing has to be invalidated, because other texts or another tokenizer have another digest.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from jaxprompt.data.tokenizer import Tokenizer

CHUNK = 10_000  # texts tokenized at a time
RULES = 2  # goes up when ids of texts change, so that old files are not read


class Ragged(NamedTuple):
    """Sequences of ids end to end: number i is ``ids[starts[i]:starts[i + 1]]``."""

    ids: Integer[np.ndarray, " n"]
    starts: Int[np.ndarray, " m"]

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.starts) - 1

    def at(self, number: int) -> Integer[np.ndarray, " s"]:
        """Sequence ``number``."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    def check(self, rows: int, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        """Raise UserError, with the text, for an id beyond an embedding table of ``rows`` rows."""
        if len(self.ids) and self.ids.max() >= rows:
            first = int(np.argmax(self.ids >= rows))
            number = int(np.searchsorted(self.starts, first, "right")) - 1
            tokenizer.check(self.at(number), rows, texts[number])


def tokenized(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path | None,
    *,
    trusted: bool = False,
    largest: int | None = None,
) -> Ragged:
    """Ids of ``texts`` without EOS, read from ``folder`` if they are there.

    A damaged file is made again. If the folder cannot be written to, nothing is kept.

    Args:
        folder: of the cache; None for no cache.
        trusted: as in ``Tokenizer.encode_all``.
        largest: bytes that the folder may have, if it belongs to the cache alone. The files that
            were used longest ago are removed first.
    """
    if folder is None:
        return _encoded(texts, tokenizer, trusted)
    file = folder / f"{_name(texts, tokenizer, trusted)}.npz"
    ragged = _read(file, len(texts))
    if ragged is None:
        ragged = _encoded(texts, tokenizer, trusted)
        _write(file, ragged)
        if largest is not None:
            _tidy(folder, largest)
    return ragged


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, trusted: bool) -> Ragged:
    dtype = np.uint16 if tokenizer.ids <= 2**16 else np.int32
    lengths, pieces = [0], [np.zeros(0, dtype)]
    for start in range(0, len(texts), CHUNK):
        for ids in tokenizer.encode_all(texts[start : start + CHUNK], trusted=trusted):
            lengths.append(len(ids))
            pieces.append(np.array(ids, dtype))
    return Ragged(np.concatenate(pieces), np.cumsum(lengths))


def _name(texts: Sequence[str], tokenizer: Tokenizer, trusted: bool) -> str:
    digest = hashlib.sha256(f"{RULES} {tokenizer.identity()} {trusted}".encode())
    for text in texts:
        coded = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(coded) + coded)
    return digest.hexdigest()[:32]


def _read(file: Path, count: int) -> Ragged | None:
    """The ids in a file; None if there is no file or it is damaged (the archive has checksums)."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            ragged = Ragged(kept["ids"], kept["starts"])
        os.utime(file)
        starts = ragged.starts
        whole = starts.shape == (count + 1,) and starts[0] == 0 and starts[-1] == len(ragged.ids)
        whole = whole and ragged.ids.dtype.kind in "iu" and bool((np.diff(starts) >= 0).all())
    except Exception:  # damage raises many kinds of errors in zipfile and NumPy
        return None
    return ragged if whole else None


def _write(file: Path, ragged: Ragged) -> None:
    """Write the whole file or none."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as stream:
            temporary = Path(stream.name)
            np.savez(stream, ids=ragged.ids, starts=ragged.starts)
        os.replace(temporary, file)
    except OSError:  # a full disk, a read-only folder: the ids are in memory all the same
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _tidy(folder: Path, largest: int) -> None:
    """Remove the files that were used longest ago, until ``largest`` bytes are left at most."""
    try:
        files = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in folder.glob("*.npz"))
        excess = sum(size for _, size, _ in files) - largest
        for _, size, file in files:
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= size
    except OSError:  # another run tidies too
        return
