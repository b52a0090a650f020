"""Checks values against a schema; what is wrong becomes one sentence."""

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.names import ALIASES

T = TypeVar("T", bound=BaseModel)


def parse(schema: type[T], values: object, prefix: str = "") -> T:
    """Validate ``values`` against ``schema``; a UserError names each key, its value and the fix."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(schema, error.errors(include_url=False), prefix)) from None


def _sentence(schema: type[BaseModel], errors: Sequence[ErrorDetails], prefix: str) -> str:
    """All problems in one sentence, as many as a person reads."""
    first: dict[str, tuple[str, ErrorDetails]] = {}
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for problem in errors:
        loc, kind = problem["loc"], problem["type"]
        if loc and loc[-1] in _TEXTS and isinstance(problem["input"], dict):
            continue  # a mapping is meant, and its own problems are told
        key = prefix + ".".join(_short(str(part)) for part in loc if part not in _UNION)
        if key in seen:  # a union reports each of its types: the first is enough for a key
            continue
        seen.add(key)
        item = kind in _TEXT_WANTED and loc and (isinstance(loc[-1], int) or loc[-1] == "[key]")
        group = key.rpartition(".")[0] + ".*" if item else key
        others[group] += group in first
        first.setdefault(group, (key, problem))
    sentences = []
    for group, (key, problem) in itertools.islice(first.items(), MOST_PROBLEMS):
        rest = f" (and {others[group]} more in {group[:-2]!r})" if others[group] else ""
        sentences.append(_problem(schema, key, problem) + rest)
    if len(first) > MOST_PROBLEMS:
        sentences.append(f"and {len(first) - MOST_PROBLEMS} more problems")
    return "; ".join(sentences) + "."


def _short(part: str) -> str:
    return part if len(part) <= 80 else f"{part[:80]}..."


MOST_PROBLEMS = 10


_TEXT_WANTED = ("string_type", "invalid_key")


# what pydantic adds to the path of a key
_TEXTS = ("str", "function-after[expanded(), str]")


_UNION = (*_TEXTS, "dict[str,any]", "TokenizerConfig", "[key]")


def _problem(schema: type[BaseModel], key: str, problem: ErrorDetails) -> str:
    value, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        return f"Unknown config key {key!r}; {_hint(schema, problem['loc'])}"
    if kind == "missing":
        return f"The config lacks {key!r}; add it"
    if kind == "value_error":
        return f"Config of {key.rstrip('.') or 'the run'!r}: {problem.get('ctx', {}).get('error')}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if kind in _TEXT_WANTED:
        message = "input should be text; put it in quotes"
        if isinstance(value, list | dict):
            form = "a list" if isinstance(value, list) else "a mapping"
            message = f"input should be text, and YAML reads it as {form}; put it in quotes"
        elif value is None:
            message = "input should be text; write '' where it is to be empty"
        elif "labels" in problem["loc"] and type(value) in (int, float):
            message += (
                ", or give words, and say in label_map which number of the data is which word"
            )
    elif kind == "list_type":
        message += ", as in [yes, no]"
    return f"Config key {key!r} is {shown(value)}: {message}"


def _hint(schema: type[BaseModel], loc: Sequence[int | str]) -> str:
    """What a person who wrote an unknown key may have meant."""
    name, allowed = str(loc[-1])[:80], _fields(schema, loc[:-1])
    close = difflib.get_close_matches(name, allowed, n=1)
    if close and difflib.SequenceMatcher(None, name, close[0]).ratio() > 0.8:
        return f"did you mean {close[0]!r}"
    if name in ALIASES:  # PEFT's and others' users
        return f"it is called {ALIASES[name]!r} here"
    elsewhere = [
        f"{section}.{name}"
        for section, field in schema.model_fields.items()
        if name in getattr(field.annotation, "model_fields", ())
    ]
    if elsewhere:
        usual = [key for key in elsewhere if key.startswith("train.")]
        return f"did you mean {(usual or elsewhere)[0]!r}"
    return f"did you mean {close[0]!r}" if close else f"allowed are {', '.join(allowed)}"


def _fields(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    for part in path:
        if part in schema.model_fields:  # else a place in a list, or a type of a union
            annotation = schema.model_fields[part].annotation
            types = (annotation, *get_args(annotation))
            schema = next(t for t in types if isinstance(t, type) and issubclass(t, BaseModel))
    return list(schema.model_fields)
