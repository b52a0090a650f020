"""Templates and verbalizers in files of PromptSource and OpenPrompt, as keys of a task."""

from collections.abc import Mapping

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import JinjaConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data import openprompt, promptsource
from jaxprompt.data.tasks.entry import Entry

# what a Jinja template decides anew: the rows of a registered task are then those of its source
_OF_A_FORM: Entry = dict.fromkeys(
    ("label_map", "class_labels", "rule", "answers", "group", "truncate")
)


def with_files_of_others(entry: Entry, values: Values) -> Values:
    """A user's values of a task, with those that files of others stand for written out.

    Args:
        entry: of the registered task that the values change; empty where they are a whole task.

    Raises:
        UserError: a file cannot be used.
    """
    values = _with_verbalizer(entry, _with_jinja(values))
    if _is_of(values.get("template"), openprompt.PREFIX):
        values = _with_openprompt(entry, values)
    for template in _list(values.get("templates")):
        if _is_of(template, promptsource.PREFIX, openprompt.PREFIX):
            raise UserError(
                f"task.templates names {shown(template)}, and only task.template may name a file "
                "of others; compare such templates as tasks of their own."
            )
    return values


def _with_openprompt(entry: Entry, values: Values) -> Values:
    """The template of a file; where its mask is within the text, words begin with a sentinel."""
    made = openprompt.read_template(str(values["template"]))
    changed: Values = {"separator": ""} | values | {"template": made.text}
    if not made.masked:
        return changed
    whole, sentinel = entry | values, openprompt.SENTINEL
    labels, words = whole.get("labels"), whole.get("verbalizer") or {}
    if not isinstance(labels, list) or not isinstance(words, dict):
        return changed | {"target": f"{sentinel} {whole.get('target', '{label}')}"}
    spelled = {label: words.get(label) or [label] for label in map(str, labels)}
    return changed | {
        "verbalizer": {k: [f"{sentinel} {word}" for word in own] for k, own in spelled.items()}
    }


def _with_jinja(values: Values) -> Values:
    template, jinja = values.get("template"), values.get("jinja")
    if _is_of(template, promptsource.PREFIX):
        made = promptsource.task_values(str(template))
        values = {key: x for key, x in values.items() if key != "template"}
    elif isinstance(jinja, str):
        made = promptsource.task_values(jinja)
    elif isinstance(jinja, Mapping):
        made = promptsource.jinja_values(parse(JinjaConfig, dict(jinja), "task.jinja."))
    else:
        return values
    kept = {key: x for key, x in values.items() if key != "jinja"}
    return _OF_A_FORM | made | kept


def _with_verbalizer(entry: Entry, values: Values) -> Values:
    """The words of a file, by the labels of the task."""
    if not _is_of(values.get("verbalizer"), openprompt.PREFIX):
        return values
    words = openprompt.label_words(str(values["verbalizer"]))
    labels = (entry | values).get("labels")
    if isinstance(words, list):
        labels = labels or [each[0] for each in words if each]
        if not isinstance(labels, list) or len(labels) != len(words):
            raise UserError(
                f"The verbalizer {shown(values['verbalizer'])} has words of {len(words)} classes, "
                f"and task.labels is {shown(labels)}; give as many labels, in the same order."
            )
        words = {str(label): own for label, own in zip(labels, words, strict=True)}
    numbers: Values = {str(number): label for number, label in enumerate(words)}
    found: Values = {"labels": labels or list(words), "label_map": numbers}
    known = {key: x for key, x in (entry | values).items() if key in found and x is not None}
    return values | found | known | {"verbalizer": words}


def _is_of(value: object, *prefixes: str) -> bool:
    return isinstance(value, str) and value.startswith(prefixes)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
