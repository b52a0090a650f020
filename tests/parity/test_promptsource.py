"""The 117 SuperGLUE templates of PromptSource 0.2.3, against what its own code makes of rows."""

import json

import pytest
from helpers import ROOT

from jaxprompt.data.jinja_templates import render
from jaxprompt.data.tasks.registry import resolve_task

FOLDER = ROOT / "tests" / "parity" / "goldens_promptsource"
GOLDEN = json.loads((FOLDER / "renders.json").read_text(encoding="utf-8"))


def test_there_are_117_templates():
    assert sum(map(len, GOLDEN["renders"].values())) == 117


@pytest.mark.parametrize("subset", GOLDEN["renders"])
def test_templates_render_as_promptsources_own_code_renders_them(subset):
    drawn = 0
    for name, expected in GOLDEN["renders"][subset].items():
        reference = f"promptsource:{FOLDER}#super_glue/{subset}/{name}"
        task = resolve_task({"name": "mine", "template": reference})
        assert task.jinja is not None
        for row, texts in zip(GOLDEN["rows"][subset], expected, strict=True):
            found = render(task.jinja, row)
            assert found == render(task.jinja, row)
            pair = [] if found is None else [found.input, found.target or ""]
            # texts without a separator, or with several, are of rows that are left out
            assert pair in [each if len(each) == 2 else [] for each in texts], (name, row)
            drawn += len(texts) > 1
    assert (drawn > 0) == (subset == "record")


def test_a_template_brings_its_answers_and_metrics():
    reference = f"promptsource:{FOLDER}#super_glue/rte/GPT-3 style"
    task = resolve_task({"name": "rte", "template": reference})
    assert task.labels == ["True", "False"] and task.metrics == ["accuracy"]
    assert task.source == "hf:aps/super_glue/rte" and task.label_map is None
    assert resolve_task(task.model_dump()) == task  # as an artefact records it, without the file
