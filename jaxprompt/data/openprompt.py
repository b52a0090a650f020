"""Templates and verbalizers of OpenPrompt (Ding et al. 2022, arXiv 2111.01998), from its files.

``openprompt:FILE#0`` names line 0 of a file of templates, or verbalizer 0 of a file of these.
``openprompt:FILE#0?text_a=premise&text_b=hypothesis`` says which columns its places stand for.
OpenPrompt evaluates what stands in braces as Python. Here it is read as a literal, so that a file
cannot run anything.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.paths import expanded, is_count
from jaxprompt.data.sources import check_file

PREFIX = "openprompt:"
SENTINEL = "<extra_id_0>"
_OLD = re.compile(r"<(text_a|text_b|soft|mask|meta:[^<>]+)>")  # before OpenPrompt 0.1.2
_GROUP = re.compile(r"\{[^{}]*\}")
_KEYS = {"placeholder", "meta", "soft", "mask", "special", "text", "shortenable", "duplicate",
         "add_prefix_space"}  # fmt: skip

Part = Mapping[object, object]


class Template(NamedTuple):
    """A template in this package's form."""

    text: str
    masked: bool  # it has a sentinel of T5 where the answer goes, with which targets begin


def read_template(reference: str) -> Template:
    """The template that a reference names.

    A mask at the end is where the target goes. A mask within the text becomes a T5's sentinel.

    Raises:
        UserError: there is no such template, or it has a part that has no counterpart here.
    """
    file, number, columns = _named(reference, "template")
    lines = _text(file).splitlines()
    if number >= len(lines) or not lines[number].strip():
        raise UserError(f"{file} has no template in line {number} (the first is 0).")
    return _converted(parsed(lines[number].rstrip(), str(file)), columns, str(file))


def parsed(line: str, where: str) -> list[Part]:
    """The parts of a template. Raises UserError for what is no literal."""
    if "{" not in line:
        line = _OLD.sub(_modern, line)
    parts, end = [], 0
    for group in _GROUP.finditer(line):
        if group.start() > end:
            parts.append({"text": line[end : group.start()]})
        parts.append(_literal(group[0], where))
        end = group.end()
    if line[end:]:
        parts.append({"text": line[end:]})
    if any(set("{}") & set(str(part["text"])) for part in parts if list(part) == ["text"]):
        raise UserError(f"The template {shown(line)} of {where} has a brace without its partner.")
    return parts


def _modern(old: re.Match) -> str:
    kind, colon, name = old[1].partition(":")
    if colon:
        return f'{{"meta": "{name}"}}'
    return f'{{"placeholder": "{kind}"}}' if kind.startswith("text") else f'{{"{kind}"}}'


def _literal(group: str, where: str) -> Part:
    try:
        value = ast.literal_eval(group)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        code = "lambda" in group or "post_processing" in group
        reason = "has code, which is not run" if code else "is no Python literal"
        raise UserError(
            f"The part {shown(group)} of {where} {reason}; mend the template."
        ) from None
    part = dict.fromkeys(value) if isinstance(value, set) else value
    if not isinstance(part, dict) or not part or set(part) - _KEYS:
        unknown = sorted(map(str, set(part) - _KEYS)) if isinstance(part, dict) else [group]
        raise UserError(
            f"The part {shown(group)} of {where} has {listed(unknown)}, which has no counterpart "
            "here; write the template in this package's form."
        )
    return part


def _converted(parts: Sequence[Part], columns: Mapping[str, str], where: str) -> Template:
    masks = [at for at, part in enumerate(parts) if "mask" in part]
    if len(masks) != 1:
        raise UserError(
            f"A template of {where} has {len(masks)} masks, and one is needed: it says where the "
            "answer goes."
        )
    behind = "".join(_written(part, columns, where) for part in parts[masks[0] + 1 :])
    text = "".join(_written(part, columns, where) for part in parts[: masks[0]])
    text, behind = (_joined(each) for each in (text, behind))
    if re.fullmatch(r"[\s.!?]*", behind):  # what ends the sentence
        return Template(text.rstrip(), False)
    return Template(f"{text}{SENTINEL}{behind}", True)


def _written(part: Part, columns: Mapping[str, str], where: str) -> str:
    for kind in ("placeholder", "meta"):
        if kind in part:
            name = str(part[kind])
            return f"{{{columns.get(name, name)}}}"
    if "soft" not in part:
        return str(part.get("text", part.get("special", ""))).replace("{", "{{").replace("}", "}}")
    words, count = part["soft"], part.get("duplicate", 1)
    if words is None and isinstance(count, int) and 0 < count < 10_000:
        return f"[prompt:{count}]"
    if isinstance(words, str) and words.strip() and "duplicate" not in part:
        return f"[soft:{words}]"
    raise UserError(f"The part {shown(dict(part))} of {where} has no counterpart here.")


def _joined(text: str) -> str:
    """Vectors that follow each other as one place."""
    several = re.compile(r"\[prompt:(\d+)\] *\[prompt:(\d+)\]")
    while (two := several.search(text)) is not None:
        both = f"[prompt:{int(two[1]) + int(two[2])}]"
        text = text[: two.start()] + both + text[two.end() :]
    return text


def label_words(reference: str) -> dict[str, list[str]] | list[list[str]]:
    """The words of each class: by its name in a JSON file, by its number in a text file.

    Raises:
        UserError: there is no such verbalizer.
    """
    file, number, _ = _named(reference, "verbalizer")
    text = _text(file)
    if file.suffix in (".json", ".jsonl"):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file} is no JSON ({str(error)[:100]}).") from None
        every = content if isinstance(content, list) else [content]
    else:
        blocks = re.split(r"\n\s*\n", text.strip())
        every = [[line.split(",") for line in block.splitlines()] for block in blocks]
    if number >= len(every):
        raise UserError(f"{file} has {len(every)} verbalizers and none with number {number}.")
    return _words_of(every[number], file)


def _words_of(value: object, file: Path) -> dict[str, list[str]] | list[list[str]]:
    by_name = isinstance(value, dict)
    classes = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{file} holds {shown(value)} where the words of classes are expected.")
    words = [[each] if isinstance(each, str) else each for each in classes]
    for each in words:
        if not isinstance(each, list) or not all(isinstance(word, str) for word in each):
            raise UserError(f"{file} holds {shown(each)} where the words of a class are expected.")
    clean = [[word.strip() for word in each if word.strip()] for each in words]
    return dict(zip(map(str, value), clean, strict=True)) if by_name else clean  # pyright: ignore


def _named(reference: str, what: str) -> tuple[Path, int, dict[str, str]]:
    """The file, the number and the columns that a reference names."""
    place, _, rest = reference.removeprefix(PREFIX).partition("#")
    number, _, pairs = rest.partition("?")
    columns: dict[str, str] = {}
    for pair in filter(None, pairs.split("&")):
        name, _, columns[name] = pair.partition("=")
    if not place or not is_count(number or "0") or not all(columns.values()):
        raise UserError(
            f"The {what} is {shown(reference)}; write {PREFIX}FILE#0, or "
            f"{PREFIX}FILE#0?text_a=COLUMN&text_b=COLUMN."
        )
    file = Path(expanded(place))
    check_file(file)
    return file, int(number or "0"), columns


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; convert it to UTF-8.") from None
