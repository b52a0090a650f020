"""`jaxprompt serve` as its user starts it: a process, a socket, a signal."""

import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from helpers import CONFIG, make_backbone, make_rows, run_values

import jaxprompt as jp
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.artefact import load_prompt, save_prompt
from jaxprompt.methods.tuned import Prompt
from jaxprompt.methods.user_library import new_library
from jaxprompt.serving.client import ServerError

TASK = {"template": "question : {text}", "max_input_length": 16, "max_target_length": 4}
LABELS = {"short": ["yes", "no"], "long": ["no", "good", "bad"]}
SMALL = ["--port", "0", "--max-rows", "4", "--max-new-tokens", "2", "--max-target-length", "4",
         "--slots", "4", "--drain-delay", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts of two lengths and two tasks on one backbone."""
    folder = tmp_path_factory.mktemp("served")
    backbone = make_backbone(folder / "tiny")
    for number, (name, labels) in enumerate(LABELS.items()):
        vectors = jax.random.normal(jax.random.key(number), (2 + number, CONFIG.d_model))
        task = {**TASK, "name": name, "labels": labels}
        metadata = {"backbone": {"source": str(backbone)}, "task": task}
        save_prompt(folder / name, Prompt(np.asarray(vectors), metadata))
    return {name: folder / name for name in LABELS}


@pytest.fixture(scope="module")
def users(prompts, tmp_path_factory):
    """A library of users, of whom one has a prompt of their own."""
    folder, shared = tmp_path_factory.mktemp("users"), load_prompt(prompts["short"])
    values = run_values(shared.metadata["backbone"]["source"], folder)
    del values["task"]["validation"]
    config = parse(RunConfig, values | {"users": {"column": "who", "freedom": "full"}})
    library = new_library(folder / "library", config, 1, shared, None)
    own = np.ascontiguousarray(shared.vectors[::-1])
    save_prompt(library.own_prompt("../4711"), Prompt(own, shared.metadata))
    return library


@pytest.fixture(scope="module")
def server(prompts, users):
    """A server that is ready, and its client."""
    command = [sys.executable, "-m", "jaxprompt", "serve", *map(str, prompts.values()),
               "--library", str(users.folder), *SMALL]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(line.strip() for line in lines if line.startswith("http://"))
        reader = threading.Thread(target=list, args=(lines,))  # else the pipe is full one day
        reader.start()
        try:
            client = jp.Client(url)
            client.wait_until_ready(200)
            yield process, client
        finally:
            process.kill()
            reader.join()


def test_a_server_answers_a_mix_of_prompts_as_predict_does(prompts, server):
    client = server[1]
    rows = [{"text": row["text"]} for row in make_rows(6)]
    names = [list(LABELS)[i % 2] for i in range(len(rows))]
    answers = client.predict(names, rows)
    assert [answer["prompt"] for answer in answers] == names
    for name in LABELS:
        mine = [i for i, each in enumerate(names) if each == name]
        expected = jp.predict(prompts[name], [rows[i] for i in mine])
        for i, wanted in zip(mine, expected, strict=True):
            scores = {s["label"]: s["log_likelihood"] for s in answers[i]["scores"]}
            assert answers[i]["prediction"] == wanted["prediction"]
            assert scores == pytest.approx(wanted["scores"], abs=1e-5)


def test_a_prompt_that_is_not_there_is_told(server):
    with pytest.raises(ServerError, match="no prompt 'other'") as caught:
        server[1].predict("other", [{"text": "one"}])
    assert caught.value.status == 404


def test_users_are_answered_by_their_own_prompts_while_these_come_and_go(users, server):
    client, rows = server[1], [{"text": "it was good"}]

    def ask(user):
        return client.predict(None, rows, user=user)[0]

    def until(condition):
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)

    own, shared = ask("../4711"), ask("nobody")
    assert (own["prompt"], shared["prompt"]) == (users.name_of("../4711"), "shared")
    assert own["scores"] != shared["scores"]
    copied = shutil.copytree(users.own_prompt("../4711"), users.folder / ".new")
    copied.rename(users.own_prompt("new"))
    until(lambda: ask("new")["prompt"] == users.name_of("new"))
    assert ask("new")["scores"] == own["scores"]
    assert users.remove("../4711")
    until(lambda: ask("../4711")["scores"] == shared["scores"])
    with pytest.raises(ServerError, match="no prompt") as caught:
        client.predict(own["prompt"], rows)
    assert caught.value.status == 404


def test_sigterm_ends_the_server_when_what_was_asked_is_answered(server):
    process, client = server
    rows = [{"text": row["text"]} for row in make_rows(64)]
    answers: list[int] = []
    ask = threading.Thread(target=lambda: answers.append(len(client.predict("short", rows))))
    ask.start()
    process.send_signal(signal.SIGTERM)
    ask.join(60)
    assert process.wait(60) == 0
    assert answers == [64]
