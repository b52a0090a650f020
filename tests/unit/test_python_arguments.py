"""Arguments of the Python names: each wrong type or value is one sentence."""

import numpy as np
import pytest
from helpers import make_backbone

import jaxprompt as jp
from jaxprompt.config.errors import UserError
from jaxprompt.data.sources import read_rows
from jaxprompt.data.writers import write_rows
from jaxprompt.methods.artefact import Prompt

pytestmark = pytest.mark.no_type_check  # of what annotations forbid

TASK = {"name": "mine", "template": "question : {text}", "labels": ["yes", "no"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("arguments") / "backbone")


@pytest.fixture(scope="module")
def session(folder):
    return jp.open_session(Prompt(np.zeros((2, 16), np.float32), {"task": TASK}), str(folder))


def test_a_backbone_may_be_a_path(folder):
    assert jp.open_session(None, folder).backbone.config.d_model == 16


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda session: jp.open_session(np.zeros((2, 16)), session.backbone), "A prompt is"),
        (lambda session: jp.save_prompt("nowhere", np.zeros((2, 16))), "A prompt is"),
        (lambda session: jp.predict(3, [{"text": "it"}]), "A prompt is 3"),
        (lambda session: jp.open_session(None, 5), "A backbone is 5"),
        (lambda session: jp.evaluate(session, split="dev"), "The split is 'dev'"),
        (lambda session: jp.score("p", [{"input": "it", "target": "yes"}]), "A session is 'p'"),
        (lambda session: jp.inspect(session, nearest=0), "nearest is 0"),
        *(
            (
                lambda session, n=n: jp.score(
                    session, [{"input": "it", "target": "yes"}], max_input_length=n
                ),
                f"max_input_length is {n}",
            )
            for n in (0, -1, 1.5)
        ),
    ],
)
def test_what_is_wrong_is_told(session, call, said):
    with pytest.raises(UserError, match=said):
        call(session)


def test_the_ending_of_an_output_may_be_in_capitals_as_that_of_an_input(tmp_path):
    write_rows(tmp_path / "OUT.CSV", [{"text": "a, b"}])
    assert (tmp_path / "OUT.CSV").read_text().startswith('"text"')
    assert list(read_rows(None, str(tmp_path / "OUT.CSV"))) == [{"text": "a, b"}]


def test_an_argument_of_loading_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="'drop'"):
        jp.load_backbone("builtin-small", drop=0.1)  # pyright: ignore[reportCallIssue]
