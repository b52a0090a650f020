import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.init import Vocabulary, initial_prompt

TABLE = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
WORDS = {"yes": [5], "not yes": [7, 9, 11], "a b c d": [20, 21, 22, 23]}
STORED = np.arange(24, dtype=np.float32).reshape(3, 8)


def start(seed=0, labels=None, **settings):
    return initial_prompt(
        PromptConfig(**settings),
        Vocabulary(
            jnp.asarray(TABLE),
            encode=lambda text: WORDS[text],
            special_ids=[0, 1, 2],
            pieces=60,
            labels=[WORDS[label] for label in labels or ()],
        ),
        seed=seed,
        from_file=lambda path: STORED,
    )


def ids_of(rows):
    """Which row of the table each vector is."""
    same = (rows[:, None] == TABLE[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.argmax(1)


@pytest.mark.parametrize("name, low, high", [("paper", -0.5, 0.5), ("code", 0.0, 0.5)])
def test_uniform_covers_the_range_of_its_name(name, low, high):
    rows = start(init="uniform", uniform=name, length=500)
    assert rows.shape == (500, 8) and rows.dtype == np.float32
    assert low <= rows.min() < low + 0.01 and high - 0.01 < rows.max() <= high


def test_sampled_rows_are_distinct_words_from_the_start_of_the_vocabulary():
    ids = ids_of(start(init="sampled_vocabulary", length=17, vocabulary=20))
    assert len(set(ids)) == 17 and ids.min() >= 3 and ids.max() < 20


def test_special_ids_may_be_drawn_as_in_the_code():
    ids = ids_of(start(init="sampled_vocabulary", length=20, vocabulary=20, special_ids="code"))
    assert sorted(ids) == list(range(20))


def test_rows_beyond_the_tokenizer_are_never_drawn():
    ids = ids_of(start(init="sampled_vocabulary", length=57, vocabulary=None))
    assert ids.max() < 60 and len(set(ids)) == 57


def test_the_authors_code_draws_from_all_rows_of_the_table():
    settings = {"init": "sampled_vocabulary", "vocabulary": None, "special_ids": "code"}
    assert sorted(ids_of(start(length=64, **settings))) == list(range(64))


def test_a_prompt_longer_than_the_population_repeats():
    assert start(init="sampled_vocabulary", length=50, vocabulary=10).shape == (50, 8)


def test_class_labels_come_first_and_several_pieces_are_averaged():
    rows = start(init="class_labels", labels=["yes", "not yes"], length=6)
    np.testing.assert_array_equal(rows[0], TABLE[5])
    np.testing.assert_allclose(rows[1], TABLE[[7, 9, 11]].mean(0), rtol=1e-6)
    assert len(set(ids_of(rows[2:]))) == 4


def test_more_labels_than_vectors_are_cut():
    rows = start(init="class_labels", labels=["yes", "not yes"], length=1)
    np.testing.assert_array_equal(rows, TABLE[[5]])


def test_text_takes_one_position_a_piece():
    np.testing.assert_array_equal(ids_of(start(init="text", text="a b c d", length=6))[:4],
                                  [20, 21, 22, 23])  # fmt: skip
    assert ids_of(start(init="text", text="a b c d", length=2)).tolist() == [20, 21]


def test_seeds_differ_and_repeat():
    a, b, c = (start(seed, init="sampled_vocabulary", length=9) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_a_stored_prompt_must_fit_unless_resizing_is_allowed():
    np.testing.assert_array_equal(start(init="file", file="x", length=3), STORED)
    with pytest.raises(UserError, match="prompt.resize=true"):
        start(init="file", file="x", length=5)
    longer = start(init="file", file="x", length=5, resize=True)
    np.testing.assert_array_equal(longer, np.concatenate([STORED, STORED[:2]]))
    np.testing.assert_array_equal(start(init="file", file="x", length=2, resize=True), STORED[:2])


@pytest.mark.parametrize("settings", [{"init": "text"}, {"init": "file"}])
def test_what_an_init_needs_must_be_given(settings):
    with pytest.raises(UserError, match="needs"):
        parse(PromptConfig, settings)
