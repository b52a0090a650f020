"""The session of `jaxprompt play`, with answers that are made up."""

import numpy as np
import pytest
from helpers_data import make_tokenizer

from jaxprompt.cli.play import OfPrompt, Play, run
from jaxprompt.config import yaml12
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.templates import fill
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.inference.predict import Predictions

TASK = TaskConfig(name="mine", template="{text}", labels=["a", "b"])
ROWS = [{"text": "a b", "label": "a"}, {"text": "b a", "label": "b"}, {"text": "e", "label": "b"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["a", "b", "c", "d", "e", "It", "was"]
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("words"), words))


class Session:
    """A game whose answers are made up, and what it was asked."""

    def __init__(self, tokenizer, printed):
        prompt = OfPrompt(TASK, tokenizer, 3, {"length": 3}, "runs/old/prompt")
        self.game, self.asked, self._printed = Play(prompt, self._ask, ROWS), [], printed

    def _ask(self, task, rows, with_prompt):
        for row in rows:
            fill(task.template, row)
        self.asked.append((task.template, with_prompt))
        best = [int("It" in task.template or row["text"].startswith("b")) for row in rows]
        scores = np.array([[-1.0 - n, -2.0 + n] for n in best], np.float32)
        return Predictions([task.labels[n] for n in best], scores)

    def __call__(self, *lines) -> str:
        run(self.game, lines)
        return self._printed().out


@pytest.fixture
def session(tokenizer, capsys):
    return Session(tokenizer, capsys.readouterr)


def test_a_text_has_the_probability_of_each_label(session):
    told = session("a b")
    assert told.splitlines()[0].split() == ["a", "█" * 22, "73.1%"]
    assert told.splitlines()[1].split() == ["b", "█" * 8, "26.9%"]


def test_other_words_ask_the_same_row_again_and_tell_what_has_moved(session):
    told = session("a b", "/template [prompt] It was {text}")
    assert "+46.2" in told and "-46.2" in told
    assert session.asked == [("{text}", True), ("[prompt] It was {text}", True)]
    session("/prompt off", "/old")
    assert session.asked[2:] == [("[prompt] It was {text}", False), ("{text}", True)]


@pytest.mark.parametrize(
    "line",
    ["/nothing", "/template", "/template {text", "/template [prompt:9] {text}", "/labels a",
     "/prompt", "/row 4", "/row x", "/compare 1", "/keep", "/keep x.txt", "/set nothing x",
     "/keep /no/such/folder/x.yaml"],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_changes_nothing(session, line):
    before = vars(session.game).copy()
    told = session(line)
    assert told.startswith("error: ") and told.count("\n") == 1
    assert vars(session.game) == before
    assert "73.1%" in session("a b")


def test_words_are_compared_on_the_loaded_rows(session):
    told = session("/template It was {text}", "/compare")
    assert "accuracy of 3 rows: old 0.6667, new 0.6667" in told
    assert "new words win 1 rows and lose 1" in told
    assert "lost /row 1: 'a' became 'b'" in told and "won  /row 3: 'a' became 'b'" in told
    assert "cannot be told apart" in told


def test_what_works_is_kept_and_nothing_is_overwritten(session, tmp_path):
    file = tmp_path / "kept.yaml"
    session("/template [prompt] {text} [soft:It was]", "/labels c, d", f"/keep {file}")
    values = yaml12.load(file.read_text())
    assert values["task"]["template"] == "[prompt] {text} [prompt:2]"
    assert values["task"]["labels"] == ["c", "d"]
    assert values["prompt"] == {"length": 3, "init": "file", "file": "runs/old/prompt"}
    assert "is there already" in session(f"/keep {file}")


def test_columns_are_set_one_by_one_where_a_template_has_several(session):
    told = session("/template {text} {more}", "hello", "/set text a", "/set more b")
    assert "the columns text, more" in told and "more still missing" in told
    assert "73.1%" in told


def test_a_row_that_no_longer_fits_waits_for_its_columns(session):
    told = session("a b", "/template {text} {more}")
    assert "the last row does not fit" in told
    assert "prompt: off" in session("/prompt off") and "prompt: 3" in session("/prompt on")
    assert "73.1%" in session("/set more c") and "73.1%" in session("/old")


def test_a_session_ends_where_it_is_told_to(session):
    assert session("/quit", "a b") == ""
