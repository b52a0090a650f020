"""Documents are short, their links lead somewhere, and their commands exist."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "configs").rglob("*.md")),
    *sorted((ROOT / "scripts").rglob("*.md")),
    *sorted((ROOT / "tests").glob("*.md")),
    *(p for p in sorted((ROOT / "jaxprompt").rglob("*.md")) if "builtin" not in p.parts),
]
NEEDED = (
    "README.md", "configs/README.md", "scripts/README.md", "scripts/bench/README.md",
    "jaxprompt/README.md", "jaxprompt/studies/README.md", "jaxprompt/models/README.md",
    "tests/README.md",
)  # fmt: skip
by_path = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def commands(path: Path):
    """The lines of code blocks, and what stands in single backquotes."""
    text = re.sub(r"\s*\\\n\s*", " ", path.read_text())
    fences = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (line for block in fences for line in block.split("\n"))
    yield from re.findall(r"(?m)^ {4}(\S.*)$", rest)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))


def arguments(line: str) -> list[str] | None:
    """What stands behind ``jaxprompt``; None where the line only shows a form."""
    line = re.sub(r"^(\.venv/bin/|python -m )", "", line)
    if not line.startswith("jaxprompt ") or "..." in line or re.search(r"[A-Z]\]|\[--| \| ", line):
        return None
    return shlex.split(re.split(r"\s{2,}", line)[0], comments=True)[1:]


def test_the_documents_that_a_reader_looks_for_are_there():
    assert [name for name in NEEDED if not (ROOT / name).is_file()] == []


def test_the_first_document_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000


@by_path
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    dead = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert dead == []


@by_path
def test_files_that_are_named_exist(path):
    named = re.findall(
        r"(?<![\w/.-])((?:scripts|configs|tests|jaxprompt)/[\w./-]+\w)", path.read_text()
    )
    missing = [x for x in named if not (ROOT / x).exists() and not list(ROOT.glob(f"{x}*"))]
    assert missing == []


# a document may train a config with another method, whose recipe then replaces the config's
@pytest.mark.filterwarnings("ignore:.*a recipe of its own:FutureWarning")
@by_path
def test_commands_have_the_options_that_they_are_given(path):
    from jaxprompt.cli.app import app
    from jaxprompt.config.overrides import read_config
    from jaxprompt.config.pretrain import PretrainConfig
    from jaxprompt.config.schema import RunConfig
    from jaxprompt.config.validation import parse

    group: Any = typer.main.get_command(app)
    for line in commands(path):
        given = arguments(line)
        if not given or given[0].startswith("-") or given[0].isupper() or "--help" in given:
            continue
        name, *rest = given
        assert name in group.commands, line
        if not rest:  # the command is spoken of
            continue
        group.commands[name].make_context(name, list(rest))  # raises where an option is unknown
        config = next((x for x in rest if x.endswith(".yaml") and x.startswith("configs/")), None)
        if name in ("train", "pretrain") and config:
            overrides = [x for x in rest if "=" in x and not x.startswith("-")]
            values = read_config(ROOT / config, overrides)
            parse(PretrainConfig if name == "pretrain" else RunConfig, values)


@by_path
def test_scripts_have_the_options_that_they_are_given(path):
    for line in commands(path):
        named = re.match(r"(?:\S+=\S+ )*(?:python3? )?(scripts/[\w/.-]+\.(?:py|sh))(.*)", line)
        if named:
            script = ROOT / named[1]  # which shares options with those beside it
            source = "".join(p.read_text() for p in (script, *script.parent.glob("*.py")))
            options = re.findall(r"(?<!\S)--[\w-]+", named[2])
            assert [option for option in options if f'"{option}"' not in source] == [], line


def test_markdown_of_the_repository_is_among_the_documents():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    known = {str(p.relative_to(ROOT)) for p in DOCUMENTS}
    assert [x for x in listed.stdout.split() if x not in known and "builtin" not in x] == []
