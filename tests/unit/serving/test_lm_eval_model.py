"""What lm-evaluation-harness asks becomes requests to a server. The harness itself is not here."""

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.serving import lm_eval_model
from jaxprompt.serving.lm_eval_model import Answers, answers_of


class Server:
    """A client whose server scores a target by its length and completes with fixed words."""

    def __init__(self, words="cat"):
        self.words = words
        self.scored, self.completed = [], []

    def score(self, prompt, pairs):
        self.scored.append([prompt, *pairs])
        return [{"log_likelihood": -len(p["target"]), "tokens": 3} for p in pairs]

    def complete(self, prompt, text, **settings):
        self.completed.append((prompt, text, settings))
        choices = [{"index": at, "text": f"{self.words} "} for at in range(len(text))]
        return {"choices": choices[::-1]}


def answers(server, **settings):
    return Answers(server, "p", concurrent=1, **settings)


@pytest.mark.no_type_check
def test_each_pair_has_the_likelihood_of_its_target_and_whether_it_is_the_greedy_answer():
    server = Server()
    pairs = [("a tail", " cat"), ("a tail", " horse"), ("a leaf", " plant")]
    found = answers(server, batch_size=2).log_likelihoods(pairs)
    assert found == [(-3.0, True), (-5.0, False), (-5.0, False)]
    assert [len(each) - 1 for each in server.scored] == [2, 1]
    assert server.scored[0][1] == {"input": "a tail", "target": "cat"}
    settings = {"max_tokens": 3, "temperature": 0.0}
    assert server.completed == [("p", ["a tail", "a leaf"], settings)]


@pytest.mark.no_type_check
def test_the_greedy_answers_may_be_left_out():
    server = Server()
    assert answers(server, greedy=False).log_likelihoods([("a", " cat")]) == [(-3.0, False)]
    assert not server.completed


@pytest.mark.no_type_check
def test_texts_come_in_the_order_of_the_requests_each_with_its_settings():
    server = Server()
    asked = [("a", {"until": ["\n"]}), ("b", {"max_gen_toks": 5}), ("c", {"until": ["\n"]})]
    assert answers(server).texts(asked) == ["cat "] * 3
    first, second = sorted(server.completed, key=lambda each: each[1])
    assert first[1] == ["a", "c"]
    assert first[2] == {"max_tokens": 256, "temperature": 0.0, "stop": ["\n"]}
    assert second[2] == {"max_tokens": 5, "temperature": 0.0}


@pytest.mark.no_type_check
def test_an_answer_is_sampled_only_where_the_task_says_so():
    server = Server()
    answers(server).texts([("a", {"do_sample": True, "temperature": 0.7, "top_p": 0.9})])
    answers(server).texts([("a", {"do_sample": False, "temperature": 0.7, "top_p": 0.9})])
    assert [each[2].get("temperature") for each in server.completed] == [0.7, 0.0]
    assert [each[2].get("top_p") for each in server.completed] == [0.9, None]


def test_model_args_may_be_texts():
    found = answers_of("http://h:1", "p", None, {"batch_size": "8", "greedy": "False"})
    assert (found.batch_size, found.concurrent, found.greedy) == (8, 2, False)
    with pytest.raises(UserError, match="whole numbers"):
        answers_of("http://h:1", "p", None, {"batch_size": "auto"})


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(lm_eval_model.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"jaxprompt\[lm-eval\]"):
        lm_eval_model.register()
