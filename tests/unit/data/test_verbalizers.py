"""Scores of words become scores of labels; calibration divides by what says nothing."""

import numpy as np
import pytest
from helpers_data import make_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.examples import check_labels, tokenize
from jaxprompt.data.tasks.registry import class_words
from jaxprompt.data.templates import answered
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.verbalizers import (
    check_batch,
    content_free_rows,
    label_words,
    log_prior,
    prior_of,
)
from jaxprompt.data.virtual_tokens import VirtualTokens

WORDS = {"yes": ["good", "True"], "no": ["bad", "False", "no"]}


def task(**changes):
    values = {"name": "t", "template": "{text}", "labels": ["yes", "no"]} | changes
    return parse(TaskConfig, values, "task.")


@pytest.mark.parametrize(
    "pooling, expected",
    [("sum", [0.6, 0.2]), ("mean", [0.3, 0.2 / 3]), ("max", [0.5, 0.1])],
)
def test_words_of_a_label_are_pooled(pooling, expected):
    words = label_words(task(verbalizer=WORDS, pooling=pooling))
    assert words.texts == ("good", "True", "bad", "False", "no")
    likelihoods = np.array([[0.5, 0.1, 0.05, 0.1, 0.05]] * 2)
    np.testing.assert_allclose(np.exp(words.pooled(np.log(likelihoods))), [expected] * 2)
    np.testing.assert_allclose(np.exp(words.pooled(np.log(likelihoods[0]))), expected)
    # hundreds of nats below: e^-900 is no number
    low = words.pooled(np.log(likelihoods).astype(np.float32) - 900)
    np.testing.assert_allclose(low + 900, np.log([expected] * 2), rtol=1e-3)


def test_labels_of_one_word_keep_their_scores():
    scores = np.array([[-1.0, -2.0]], np.float32)
    assert label_words(task()).pooled(scores) is scores
    named = task(verbalizer={"yes": ["good"]})
    assert label_words(named).texts == ("good", "no")
    assert label_words(named).pooled(scores) is scores


def test_calibration_divides_by_the_mean_probability():
    """Zhao et al. 2021: q = p / p_cf, p_cf the mean over inputs without content."""
    free = np.log(np.array([[0.2, 0.8], [0.3, 0.7], [0.1, 0.9]], np.float32)) - 3.0
    scores = np.log(np.array([[0.15, 0.85], [0.25, 0.75]], np.float32))
    np.testing.assert_allclose(np.exp(log_prior(free)), [0.2, 0.8], rtol=1e-6)
    prior = prior_of(task(calibration="content_free"), scores, free)
    # 0.15/0.2 < 0.85/0.8, and 0.25/0.2 > 0.75/0.8
    assert (scores - prior).argmax(axis=1).tolist() == [1, 0]
    given = task(calibration="batch", label_prior={"yes": 0.2, "no": 0.8})
    np.testing.assert_allclose(prior_of(given, scores, free[:0]), prior, rtol=1e-6)
    assert prior_of(task(), scores, free[:0]) is None


def test_calibration_of_labels_that_are_all_but_impossible():
    """A label of many tokens is hundreds of nats below the others: e^-200 is no float32."""
    free = np.array([[0.0, -200.0], [0.0, -202.0], [0.0, -201.0]], np.float32)
    # p / p_cf of "no": e^-210 / e^-200.69 for the first row, e^-190 / e^-200.69 for the second
    scores = np.array([[0.0, -210.0], [0.0, -190.0]], np.float32)
    assert (scores - log_prior(free)).argmax(axis=1).tolist() == [0, 1]


def test_calibration_by_batch_leaves_out_what_is_not_finite_and_wants_rows():
    scores = np.log(np.array([[0.2, 0.8], [0.4, 0.6]] * 4, np.float32))
    broken = np.concatenate([scores, np.full((1, 2), np.nan, np.float32)])
    batch = task(calibration="batch")
    np.testing.assert_allclose(np.exp(prior_of(batch, broken, broken[:0])), [0.3, 0.7], rtol=1e-6)
    assert np.isnan(log_prior(broken[-1:])).all()
    with pytest.raises(UserError, match="and 1 is fewer than 8; ask more together, use content_f"):
        check_batch(batch, 1)
    with pytest.raises(UserError, match="and 2 are fewer than 8"):
        prior_of(batch, scores[:2], scores[:0])


def test_rows_without_content_have_every_column():
    spaced = task(template="{{x}} [prompt] {the text} {a} {a}", content_free=["N/A", ""])
    assert content_free_rows(spaced) == [{"the text": text, "a": text} for text in ("N/A", "")]
    jinja = {
        "text": "{{ q }} {{ n }} ||| {{ answer_choices[label] }}",
        "answer_choices": "yes|||no",
    }
    values = {"template": "{rendered_input}", "content_free": ["N/A"]}
    [row] = content_free_rows(task(jinja=jinja, **values))
    assert row["rendered_input"] == "N/A N/A"
    with pytest.raises(UserError, match="has no text for rows without content; use batch"):
        content_free_rows(task(jinja={"text": "{% if q == 1 %}{{ q }} ||| a{% endif %}"}, **values))


def test_training_writes_the_first_word(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    several = task(verbalizer=WORDS)
    rows = [{"text": "it was", "label": "yes"}, {"text": "it was", "label": "no"}]
    targets = [each.targets for each in tokenize(several, rows, tokenizer, VirtualTokens(64, 2))]
    assert [ids.tolist() for ids in targets] == tokenizer.encode_targets(["good", "bad"])
    assert class_words(several) == ["good", "bad"]
    assert "b\ufdd0a\ufdd0d" in answered(several, rows[1])[1]
    with pytest.raises(UserError, match="'unheard' has no token|Label 'unheard'"):
        check_labels(task(verbalizer={"yes": ["good", "unheard"]}), tokenizer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"verbalizer": {"maybe": ["x"]}}, "has the label 'maybe', and labels are 'yes'"),
        ({"verbalizer": {"yes": []}}, "give one word or more, none of them blank"),
        ({"verbalizer": {"yes": ["a", " "]}}, "give one word or more, none of them blank"),
        ({"verbalizer": {"yes": ["a"], "no": ["a"]}}, "verbalizer has the word 'a' twice"),
        ({"verbalizer": {"yes": ["no"]}}, "verbalizer has the word 'no' twice"),
        ({"verbalizer": {"yes": ["a"]}, "labels": None}, "labels are not given"),
        ({"label_prior": {"yes": 0.5}}, "label_prior lacks 'no'; give a number for each label"),
        ({"label_prior": {"yes": 0, "no": 1}}, "task.label_prior.yes"),
        ({"calibration": "batch", "labels": None}, "it is for labels that are ranked"),
        ({"calibration": "batch", "decoding": "greedy"}, "it is for labels that are ranked"),
        ({"calibration": "some"}, "'content_free' or 'batch'"),
        ({"pooling": "first"}, "'sum', 'mean' or 'max'"),
        ({"content_free": []}, "task.content_free"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        task(**changes)
