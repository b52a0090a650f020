"""JSON from files that nobody vouches for."""

import json
from collections import Counter
from pathlib import Path

from jaxprompt.config.errors import UserError, shown

JsonObject = dict[str, object]  # values are narrowed where they are used


def parse_json(text: str | bytes, where: str | Path) -> object:
    """The value of a JSON text.

    Args:
        where: the file, for errors.

    Raises:
        UserError: the text is not JSON, nests too deep or names a key twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> JsonObject:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise UserError(f"{where} names the key {shown(twice)} twice; keep one of them")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it nests too deep") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {str(error)[:200]}") from error


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file; UserError if the file holds anything else."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value
