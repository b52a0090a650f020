"""The task that a prompt is asked: its own, another one, or its own with other keys."""

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.inference.session import prompt_task
from jaxprompt.methods.tuned import Prompt

OWN = resolve_task({"name": "mine", "template": "{text}", "labels": ["yes", "no"]})
PROMPT = Prompt(np.zeros((2, 4), np.float32), {"task": OWN.model_dump()})  # type: ignore[typeddict-item]


@pytest.mark.parametrize("changes", [{"calibration": "batch"}, "{calibration: batch}"])
def test_keys_without_a_name_change_the_prompts_own_task(changes):
    assert prompt_task(PROMPT, None) == OWN
    assert prompt_task(PROMPT, changes) == OWN.model_copy(update={"calibration": "batch"})


def test_a_template_of_others_brings_its_own_labels():
    jinja = "{jinja: {text: '{{text}}? ||| {{answer_choices[label]}}', answer_choices: a ||| b}}"
    changed = prompt_task(PROMPT, jinja)
    assert changed.labels == ["a", "b"] and changed.template == "{rendered_input}"


def test_a_mistake_is_one_sentence():
    for changes, message in {
        "{calibration: some}": "task.calibration",
        "{calibration: batch": "The value of 'task' is not valid YAML",
        "{verbalizer: {maybe: [x]}}": "has the label 'maybe', and labels are 'yes', 'no'",
    }.items():
        with pytest.raises(UserError, match=message):
            prompt_task(PROMPT, changes)
    with pytest.raises(UserError, match="The config lacks 'task.name'"):
        prompt_task(None, {"calibration": "batch"})
