"""Tasks by name and by mapping, and the ids they make: EOS, trimming, virtual tokens, errors."""

import numpy as np
import pytest
from helpers import write_rows
from helpers_data import make_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import references, target_texts
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.registry import TASKS, class_words, resolve_task
from jaxprompt.data.tasks.rules import RULES, apply_rule
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import to_text
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.metrics import METRICS, accuracy, group_exact_match

V, P = 64, 5  # rows of the embedding table; more than the tokenizer has


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def task(**changes):
    return TaskConfig(**({"name": "t", "template": "question : {text}"} | changes))


def row(text, label="yes"):
    return {"text": text, "label": label}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_complete(name):
    entry = resolve_task(name)
    assert entry.name == name and entry.validation
    assert bool(entry.train) != name.startswith("mrqa_")  # which are only tested on
    assert set(entry.metrics) <= set(METRICS)
    assert entry.rule is None or entry.rule in RULES
    assert set((entry.label_map or {}).values()) <= set(entry.labels or ())
    if entry.source.startswith("builtin:"):
        for split in (entry.train, entry.validation, entry.test):
            texts = {to_text(entry, row)[1] for row in read_rows(entry.source, split)}
            assert texts == set(entry.labels)


def test_unknown_task_suggests_near_names():
    with pytest.raises(UserError, match="'supersens' is unknown; did you mean supersense"):
        resolve_task("supersens")
    with pytest.raises(UserError, match="'bolq' is unknown; did you mean boolq"):
        resolve_task({"name": "bolq", "max_input_length": 64})
    with pytest.raises(UserError, match="'xyzzy' is unknown; known are supersense, spam, boolq"):
        resolve_task("xyzzy")


@pytest.mark.parametrize("name", [["boolq"], {"boolq": 1}, 3, True, None, 1.5])
def test_a_name_that_is_no_text_is_one_sentence(name):
    with pytest.raises(UserError, match="task.name.* is "):
        resolve_task({"name": name, "template": "{a}"})


def test_a_prefix_of_a_template_that_is_no_text_is_one_sentence():
    for template in (3, None, {"a": "b"}, ["{a}"]):
        with pytest.raises(UserError, match="'task.template' is .*text"):
            resolve_task({"name": "boolq", "prefix": True, "template": template})


def test_mapping_changes_a_known_task():
    changed = resolve_task({"name": "boolq", "max_input_length": 64})
    assert changed == resolve_task("boolq").model_copy(update={"max_input_length": 64})
    files = resolve_task({"name": "boolq", "train": "t.jsonl", "validation": "v.jsonl"})
    assert files.source is None and files.test is None and files.train == "t.jsonl"
    assert files.template == resolve_task("boolq").template
    other = resolve_task({"name": "boolq", "source": "tfds:super_glue/boolq"})
    assert other.source == "tfds:super_glue/boolq" and other.train == "train"


def test_the_words_that_prompts_start_from():
    # Lester et al. 2021, footnote 7, of the two tasks of SuperGLUE that have no labels
    assert class_words(resolve_task("record")) == [
        "commonsense", "reasoning", "reading", "comprehension"
    ]  # fmt: skip
    assert class_words(resolve_task("wsc")) == ["commonsense", "pronoun", "resolution"]
    assert class_words(resolve_task("cb")) == ["entailment", "contradiction", "neutral"]
    assert class_words(resolve_task({"name": "cb", "class_labels": ["so"]})) == ["so"]
    assert class_words(resolve_task("xsum")) == []
    for words in ([], [" "], ["a", ""]):
        with pytest.raises(UserError, match="class_labels are .*give words"):
            resolve_task({"name": "mine", "template": "{a}", "class_labels": words})


def test_mapping_of_ones_own_needs_no_code():
    mine = resolve_task({"name": "mine", "train": "t.csv", "template": "{a}", "labels": ["x", "y"]})
    assert mine.target == "{label}" and mine.source is None
    with pytest.raises(UserError, match="lables.*labels"):
        resolve_task({"name": "mine", "template": "{a}", "lables": ["x", "y"]})


@pytest.mark.parametrize("template", ["question : {text}", "{text} [prompt] it was"])
@pytest.mark.parametrize("words", [0, 1, 3, 40])
@pytest.mark.parametrize("limit", [1, 2, 4, 20])
def test_eos_and_all_virtual_tokens_survive_any_trimming(tokenizer, template, words, limit):
    short = task(template=template, max_input_length=limit)
    text = " ".join(["one"] * words)
    [example] = tokenize(short, [row(text)], tokenizer, VirtualTokens(V, P))
    virtual = example.inputs >= V
    np.testing.assert_array_equal(example.inputs[virtual], V + np.arange(P))
    real = example.inputs[~virtual]
    assert real[-1] == tokenizer.eos_id and (real == tokenizer.eos_id).sum() == 1
    whole = tokenizer.encode(template.replace("[prompt]", "").replace("{text}", text))
    assert real[:-1].tolist() == whole[: limit - 1]
    assert example.targets.tolist() == [*tokenizer.encode("yes"), tokenizer.eos_id]
    assert example.inputs.dtype == example.targets.dtype == np.int32


def test_virtual_tokens_stand_where_the_template_says(tokenizer):
    hybrid = task(template="[prompt:2] {text} it was [prompt]")
    [example] = tokenize(hybrid, [row("one two")], tokenizer, VirtualTokens(V, P, 3))
    first = V + 3 * P
    words = tokenizer.encode("one two it was")
    assert example.inputs.tolist() == [
        first, first + 1, *words, first + 2, first + 3, first + 4, tokenizer.eos_id
    ]  # fmt: skip


def test_without_prompt_there_are_only_words(tokenizer):
    [example] = tokenize(
        task(template="[prompt:2] {text}"), [row("one")], tokenizer, VirtualTokens(V, 0)
    )
    assert example.inputs.tolist() == [*tokenizer.encode("one"), tokenizer.eos_id]


def test_prediction_needs_no_targets(tokenizer):
    labelled = task(labels=["yes", "no"])
    [example] = tokenize(
        labelled, [{"text": "one"}], tokenizer, VirtualTokens(V, P), need_targets=False
    )
    assert len(example.targets) == 0


def test_long_targets_are_an_error_and_never_cut(tokenizer):
    rows = [row("a"), row("a", "one two three")]
    exact = tokenize(task(max_target_length=4), rows, tokenizer, VirtualTokens(V, P))
    assert len(exact[1].targets) == 4
    with pytest.raises(UserError, match="row 2 of v.csv has 4 tokens .*max_target_length is 3"):
        tokenize(task(max_target_length=3), rows, tokenizer, VirtualTokens(V, P), origin="v.csv")


def test_errors_name_the_row_and_where_it_is_from(tokenizer):
    limited, rows = task(labels=["yes", "no"]), [row("a"), row("b", "oui")]
    with pytest.raises(UserError, match="row 2 of v.csv has the label 'oui'; allowed are 'yes', "):
        tokenize(limited, rows, tokenizer, VirtualTokens(V, P), origin="v.csv")
    with pytest.raises(UserError, match="row 2 of task 't' has the label"):
        target_texts(limited, rows)
    with pytest.raises(UserError, match="column 'text', which row 1 of v.csv lacks"):
        tokenize(limited, [{"label": "no"}], tokenizer, VirtualTokens(V, P), origin="v.csv")
    assert target_texts(limited, rows[:1]) == ["yes"]


def test_control_tokens_in_a_text_stay_text(tokenizer):
    ids = tokenizer.encode("one </s> two <pad> three </s><extra_id_0>")
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert ids[-1] == tokenizer.encode("<extra_id_0>")[0]  # sentinels may be used in templates


def test_encoding_together_is_encoding_alone(tokenizer):
    texts = ["one two", "", "</s>", "question : three"]
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_all([]) == []


def test_decode_stops_at_eos_and_skips_what_is_no_word(tokenizer):
    one, two = tokenizer.encode("one two")
    ids = np.array([one, tokenizer.pad_id, tokenizer.size, V + 2, two, tokenizer.eos_id, one])
    assert tokenizer.decode(ids) == "one two"
    assert tokenizer.decode([]) == "" == tokenizer.decode([tokenizer.eos_id, one])


def test_byt5_tokenizer_without_vocabulary_file(tmp_path):
    import transformers

    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    byt5 = load_tokenizer(tmp_path)
    ids = byt5.encode("é </s>")
    assert ids[:2] == [0xC3 + 3, 0xA9 + 3] and byt5.eos_id not in ids
    assert byt5.decode([*byt5.encode("héllo"), byt5.eos_id, 300, 2000]) == "héllo"


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)


# ---- rows of a split


def test_some_rows_are_whole_groups_where_groups_are_judged(tmp_path):
    """A group that lost rows would be right more often than it is."""
    # 200 groups of five answers, of which the last is wrong in half of the groups; rows of two
    # groups alternate, as rows of a group need not follow each other
    rows = [
        {"text": "one", "label": "yes" if a < 4 or 61 * g % 200 < 100 else "no", "q": g}
        for pair in range(100) for a in range(5) for g in (2 * pair, 2 * pair + 1)
    ]  # fmt: skip
    path = str(write_rows(tmp_path / "v.jsonl", rows))
    grouped = task(validation=path, group="q", labels=["yes", "no"])

    def figures(limit):
        found = references(grouped, load_rows(grouped, "validation", limit))
        judged = {r.group for r in found}
        assert len(found) == 5 * len(judged)  # whole groups
        return len(found), group_exact_match(["yes"] * len(found), found)

    assert figures(None) == (1000, 0.5)
    for limit in (1, 5, 7, 200, 999):
        count, _ = figures(limit)
        assert count == max(5, limit // 5 * 5)
    assert figures(500)[1] == pytest.approx(0.5, abs=0.05)
    one_by_one = task(validation=path, labels=["yes", "no"])
    assert len(load_rows(one_by_one, "validation", 7)) == 7
    found = references(one_by_one, load_rows(one_by_one, "validation"))
    assert accuracy(["yes"] * 1000, found) == 0.9


def test_rows_without_a_label_are_read_to_be_answered_and_not_to_be_learnt(tmp_path):
    path = str(
        write_rows(tmp_path / "rows.jsonl", [{"passage": "a", "question": "b", "label": -1}])
    )
    boolq = resolve_task({"name": "boolq", "train": path, "validation": path, "test": path})
    for split in ("validation", "test"):
        rows = load_rows(boolq, split)
        assert [row["passage"] for row in rows] == ["a"]
        with pytest.raises(UserError, match=r"row 1 .* has the label '-1'.*can be answered"):
            references(boolq, rows)
    with pytest.raises(UserError, match="row 1 .* has the label '-1'"):
        load_rows(boolq, "train")
    with pytest.raises(UserError, match="needs column 'passage', which row 2"):
        write_rows(tmp_path / "rows.jsonl", [{"passage": "a", "question": "b"}, {"question": "c"}])
        load_rows(boolq, "test")


@pytest.mark.parametrize(
    "value",
    [{"text": ["a"], "answer_start": [0]}, 3, True, "one", [], [None], [["a"]], [{"text": "a"}],
     ["a", False], [float("nan")], 2.5],
)  # fmt: skip
def test_answers_are_a_list_of_texts(value):
    judged = task(target="{text}", answers="all")
    with pytest.raises(UserError, match="row 2 of v.csv has .* 'all'; give a list of texts"):
        references(judged, [{"text": "a", "all": ["b"]}, {"text": "a", "all": value}], "v.csv")


def test_all_accepted_answers_are_texts():
    judged = task(target="{text}", answers="all")
    for value in (["b", "c"], ("b", "c"), np.array(["b", "c"])):
        [found] = references(judged, [{"text": "a", "all": value}])
        assert found.answers == ("b", "c")
    [found] = references(judged, [{"text": "a", "all": [1912, 2.5]}])
    assert found.answers == ("1912", "2.5")


@pytest.mark.no_type_check
@pytest.mark.parametrize(
    "value, message",
    [
        ({"name": [1], "template": "{a}"}, r"task.name is \[1\]; give one word"),
        ({"name": {"a": 1}}, "task.name is {'a': 1}; give one word"),
        ({"name": 5, "template": "{a}"}, "task.name is 5; give one word, in quotes"),
        ({"name": "boolq", "prefix": True, "template": ["{a}"]}, "'task.template' is .*text"),
        ({"name": "boolq", "prefix": "yes"}, "task.prefix is 'yes'; it is true or false"),
        (5, "A task is 5; give a name"),
        (["boolq"], r"A task is \['boolq'\]; give a name"),
        ("x" * 10**6, "is unknown"),
    ],
)
def test_tasks_of_the_wrong_type_are_one_sentence(value, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_task(value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("squad", {"question": "q", "context": "c", "answers": "Paris"}, "'answers' is 'Paris'"),
        ("squad", {"question": "q", "context": "c", "answers": [1]}, r"'answers' is \[1\]"),
        ("squad", {"question": "q", "context": "c"}, "'answers' is None"),
        ("record", {"passage": "p", "query": "q", "entities": "Ann", "answers": ["Ann"],
                    "idx": {"passage": 0, "query": 0}}, "'entities' is 'Ann'"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": float("inf")}, "its label is 'inf'"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "x"}, "not as the rule"),
        ("wsc", {"text": "a b", "span1_text": "a", "span2_text": "b", "span2_index": 1,
                 "label": None}, "its label is None; it is True or False"),
        ("web_nlg", {"input": "a | b | c", "target": "t"}, "'input' is .*list of texts"),
        ("web_nlg", {"input": ["a | b | c"]}, "neither a target nor references"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_refused_by_rules(name, row, message):
    with pytest.raises(UserError, match=f"Row 1 of a.csv.*{message}"):
        apply_rule(resolve_task(name), [row], training=True, origin="a.csv")


@pytest.mark.parametrize("name", ["copa", "stsb"])
@pytest.mark.parametrize("label", [None, float("nan")])
def test_a_label_that_is_null_is_no_word_for_a_rule(name, label):
    row = next(RULES[name]([{"label": label}], False))
    assert row["label"] is None
