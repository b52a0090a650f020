"""Templates of PromptSource (Bach et al. 2022, arXiv 2202.01279), read from its own files.

``promptsource:PATH#super_glue/rte/GPT-3 style`` names one. PATH is a checkout of the repository, an
unpacked source package, or a folder or file of either. The tags in the files are read as mappings,
and no other tag is read.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

import yaml

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.config.schema import JinjaConfig
from jaxprompt.config.values import Values
from jaxprompt.data.jinja_templates import INPUT, SEPARATOR, TARGET, fixed_choices

PREFIX = "promptsource:"
_FILE = "templates.yaml"
_FORM = f"write {PREFIX}PATH#super_glue/rte/GPT-3 style"
_MOST_BYTES = 4_000_000

# names of metrics; whatever else there is becomes accuracy, or exact_match without labels
_METRICS = {
    "Accuracy": ["accuracy"],
    "Squad": ["token_f1", "exact_match"],
    "Trivia QA": ["exact_match", "token_f1"],
    "BLEU": ["bleu"],
    "ROUGE": ["rougeLsum", "rouge1", "rouge2"],
    "Pearson Correlation": ["pearson"],
    "Spearman Correlation": ["spearman"],
}


# the parser in C is ten times as fast, where PyYAML has it
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """YAML 1.1, which the files are written in, with PromptSource's two tags."""


def _mapping(loader: yaml.constructor.SafeConstructor, node: yaml.Node) -> object:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "no mapping", node.start_mark)
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


def read_file(path: Path) -> dict[str, Values]:
    """The templates of a file by their names. Raises UserError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is larger than {_MOST_BYTES:,} bytes; name a {_FILE}.")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no file of PromptSource templates ({problem}).") from None
    templates = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(templates, dict) or not templates:
        raise UserError(f"{path} is no file of PromptSource templates; it has no 'templates'.")
    named: dict[str, Values] = {}
    for number, template in enumerate(templates.values(), 1):
        usable = isinstance(template, dict) and isinstance(template.get("jinja"), str)
        if not usable or template.get("name") is None:
            raise UserError(f"Template {number} of {path} has no 'name' or no 'jinja' of text.")
        named[str(template["name"])] = template
    return named


def task_values(reference: str) -> Values:
    """The keys of a task that a template sets: ``promptsource:PATH#DATASET/NAME``.

    Raises:
        UserError: there is no such template, or it is not usable.
    """
    place, mark, name = reference.removeprefix(PREFIX).partition("#")
    if not mark or not place or not name:
        raise UserError(f"The template is {shown(reference)}; {_FORM}.")
    file, name = _find(Path(expanded(place)), name)
    template = _choose(read_file(file), name, file)
    values = jinja_values(as_jinja(template))
    metadata = template.get("metadata")
    names = metadata.get("metrics") if isinstance(metadata, Mapping) else None
    known = [each for name in names or () for each in _METRICS.get(str(name), ())]
    usual = "accuracy" if values["labels"] else "exact_match"
    return values | {"metrics": list(dict.fromkeys(known)) or [usual]}


def as_jinja(template: Mapping[str, object]) -> JinjaConfig:
    """The Jinja of a template of ``read_file``; old files have the answers as a list."""
    choices = template.get("answer_choices")
    if isinstance(choices, list):
        choices = f" {SEPARATOR} ".join(map(str, choices))
    text = choices if isinstance(choices, str) and choices.strip() else None
    return JinjaConfig(text=str(template["jinja"]), answer_choices=text)


def jinja_values(jinja: JinjaConfig) -> Values:
    """The keys of a task that its Jinja template sets. Raises UserError where it is no Jinja."""
    labels = fixed_choices(jinja.answer_choices)
    if labels is not None and (len({*labels}) < len(labels) or not all(labels)):
        labels = None
    return {
        "template": f"{{{INPUT}}}",
        "target": f"{{{TARGET}}}",
        "jinja": jinja.model_dump(),
        "labels": labels,
    }


def _find(path: Path, name: str) -> tuple[Path, str]:
    """The file, and what is left of the name: that of the template."""
    if path.is_file():
        return path, name
    if not path.is_dir():
        raise UserError(f"There is no file or folder {shown(str(path))}{looked_in(path)}.")
    parts = name.split("/")
    for root in (path, path / "templates", path / "promptsource" / "templates"):
        for count in range(min(3, len(parts) - 1), -1, -1):
            file = root.joinpath(*parts[:count]) / _FILE
            if ".." not in parts and file.is_file():
                return file, "/".join(parts[count:])
    raise UserError(
        f"{path} has no templates of the data set of {shown(name)}; name it as its folders are "
        f"called, and a template of its {_FILE} behind it, as in #super_glue/rte/GPT-3 style."
    )


def _folded(name: str) -> str:
    """A name as people type it."""
    return name.replace("\N{HORIZONTAL ELLIPSIS}", "...").strip(" .?!").casefold()


def _choose(templates: Mapping[str, Values], name: str, file: Path) -> Values:
    if name in templates:
        return templates[name]
    alike = [own for own in templates if _folded(own) == _folded(name)]
    by_id = [each for each in templates.values() if each.get("id") == name]
    if len(alike) == 1:
        return templates[alike[0]]
    if by_id:
        return by_id[0]
    close = difflib.get_close_matches(name[:200], templates, n=3, cutoff=0.4) or [*templates][:8]
    raise UserError(
        f"{file} has no template {shown(name)}; it has {len(templates)}, such as "
        f"{listed(map(repr, close))}."
    )
