"""Tasks of encoders with a mask: where it stands, what labels are, and what is refused."""

import numpy as np
import pytest
from helpers_data import make_masked_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens

CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_masked_tokenizer(tmp_path_factory.mktemp("masked")), masked=True)


def task(**changes):
    values = {"name": "mine", "template": "{text} it was [mask].", "labels": ["good", "bads"]}
    return TaskConfig(**values | changes)


def encoded(tokenizer, length=0, text="one two", label="good", **changes):
    rows = [{"text": text, "label": label}]
    [example] = tokenize(task(**changes), rows, tokenizer, VirtualTokens(40, length))
    return example


def words(tokenizer, ids):
    return [tokenizer.piece(id) if id < tokenizer.size else "*" for id in ids.tolist()]


def test_a_prompt_is_in_front_and_the_answer_has_the_place_of_the_mask(tokenizer):
    example = encoded(tokenizer, length=2)
    found = words(tokenizer, example.inputs)
    assert found == ["*", "*", "[CLS]", "one", "two", "it", "was", "[MASK]", ".", "[SEP]"]
    assert words(tokenizer, example.targets) == ["good"]
    assert words(tokenizer, encoded(tokenizer, label="bads").targets) == ["bad", "##s"]


def test_virtual_tokens_may_stand_around_the_mask(tokenizer):
    template = "{text} [prompt:2] [mask] [prompt:1]"
    found = words(tokenizer, encoded(tokenizer, length=3, template=template).inputs)
    assert found == ["[CLS]", "one", "two", "*", "*", "[MASK]", "*", "[SEP]"]


def test_the_mask_may_have_the_name_that_the_vocabulary_has(tokenizer):
    own = encoded(tokenizer, template="{text} it was [MASK].")
    assert np.array_equal(own.inputs, encoded(tokenizer).inputs)


def test_a_row_cannot_spell_the_mask(tokenizer):
    inputs = encoded(tokenizer, text="one [MASK] [mask] two").inputs
    assert (inputs == MASK).sum() == 1


def test_a_long_row_loses_text_and_never_its_mask(tokenizer):
    inputs = encoded(tokenizer, text="one two three " * 20, max_input_length=12).inputs
    assert len(inputs) == 12 and words(tokenizer, inputs)[-3:] == ["[MASK]", ".", "[SEP]"]
    with pytest.raises(UserError, match=r"The \[mask\] of row 1 of task 'mine' is beyond"):
        encoded(tokenizer, max_input_length=4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"template": "{text}"}, r"has no \[mask\], and an encoder with a mask answers at one"),
        ({"template": "[mask] {text} [mask]"}, r"has 2 \[mask\]"),
        ({"labels": None}, "has its answers generated"),
        ({"decoding": "greedy"}, "only chooses from labels"),
    ],
)
def test_a_task_without_one_mask_and_labels_is_refused(tokenizer, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        encoded(tokenizer, **changes)


def test_a_tokenizer_of_another_model_has_no_mask(tokenizer):
    plain = load_tokenizer(tokenizer._inner.name_or_path)
    assert plain.mask_id is None and not plain.num_masks("[mask]")
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.start_ids) == (MASK, SEP, [CLS])
