"""The reference of settings comes from the schema, and the document is not stale."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from jaxprompt.config.errors import UserError
from jaxprompt.config.names import RENAMED
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.reference import (
    BEGIN,
    END,
    Setting,
    as_markdown,
    find,
    json_schema,
    main,
    reference,
    renewed,
    settings,
)
from jaxprompt.config.schema import RunConfig

DOCUMENT = Path(__file__).parents[3] / "configs" / "README.md"


def leaves(schema: type[BaseModel], prefix: str = "") -> set[str]:
    """Keys of all fields that are no sections themselves, found in the classes."""
    keys: set[str] = set()
    for name, field in schema.model_fields.items():
        kind: Any = field.annotation
        section = isinstance(kind, type) and issubclass(kind, BaseModel)
        keys |= leaves(kind, f"{prefix}{name}.") if section else {prefix + name}
    return keys


@pytest.mark.parametrize("schema", [RunConfig, PretrainConfig])
def test_every_setting_is_there_with_a_description(schema):
    rows = settings(schema)
    keys = [row.key for row in rows]
    assert leaves(schema) <= set(keys) and len(set(keys)) == len(keys)
    assert all(row.description.endswith((".", "}")) and row.type for row in rows)


def test_a_setting_tells_its_type_default_and_range():
    [length] = find("prompt.length")
    assert length[:4] == ("prompt.length", "whole number", "100", "1 to 65,536")
    [rate] = find("train.learning_rate")
    assert rate[1:4] == ("number", "0.3", "> 0")
    [dtype] = find("dtype")
    assert dtype[:4] == ("model.dtype", "text or null", "null", "float32, bfloat16, mixed")
    [output] = find("output")
    assert output[1:3] == ("path", "")
    [labels] = find("labels")
    assert labels[:3] == ("task.labels", "list of texts or null", "null")
    assert {row.key for row in find("mesh")} == {"mesh.data", "mesh.fsdp", "mesh.tensor"}
    assert "text.N.weight" in {row.key for row in settings(PretrainConfig)}


def test_a_setting_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="There is no setting 'nope'; name one, or one of .*train"):
        find("nope")


def test_a_table_escapes_what_markdown_reads():
    table = as_markdown([Setting("a.b", "text", "", "x|y", "one | two.")])
    assert table.splitlines()[-1] == r"| `a.b` | text (x\|y) | required | one \| two. |"


def test_the_json_schema_knows_tasks_and_refuses_unknown_keys():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["task"]["anyOf"][0] == {"type": "string"}
    task = schema["$defs"]["TaskConfig"]
    assert task["required"] == ["name"] and "template" in task["properties"]
    assert schema["$defs"]["TrainConfig"]["properties"]["steps"]["exclusiveMinimum"] == 0
    assert "TextSource" in json_schema(PretrainConfig)["$defs"]


def test_the_document_of_settings_is_not_stale():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == renewed(text), (
        "run python -m jaxprompt.config.reference --write configs/README.md"
    )


def test_the_part_between_the_markers_is_renewed(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(["--write", str(file)])
    assert file.read_text() == f"before\n{reference()}\nafter\n"
    with pytest.raises(UserError, match="lacks a marker"):
        renewed("nothing")


def test_every_config_is_in_the_document_and_no_link_is_dead():
    text = DOCUMENT.read_text(encoding="utf-8")
    links = {(DOCUMENT.parent / path).resolve() for path in re.findall(r"\]\(([^)#]+)\)", text)}
    assert all(path.exists() for path in links)
    for path in DOCUMENT.parent.rglob("*.yaml"):
        assert path in links or path.parent in links, path


def test_the_document_tells_old_names():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| `{old}` | `{new}` |" in text for old, new in RENAMED.items())


@pytest.mark.parametrize(
    "name, here",
    [("train.lr", "train.learning_rate"), ("train.eval_rows", "train.max_eval_examples")],
)
def test_a_setting_of_another_library_or_an_old_name_is_told_its_name_here(name, here):
    with pytest.raises(UserError, match=f"it is called '{here}' here"):
        find(name)
