"""A run with users: it goes on as if it had not stopped, and a user is one folder, his all."""

import json

import jax
import numpy as np
import pytest
from helpers import Killer, make_backbone, run_values, write_rows
from safetensors.numpy import load_file

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.user_library import open_library
from jaxprompt.serving.store import DirectoryStore
from jaxprompt.training.add_user import add_user
from jaxprompt.training.dry_run import dry_run
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter

USERS = ("../../up", "b@example.org", "c d", "e")


def rows_of(user, count=8):
    words = [("one", "yes"), ("two three", "no")]
    turn = USERS.index(user) if user in USERS else 0
    return [
        {"text": f"{words[(i + turn) % 2][0]} it was good", "label": words[i % 2][1], "who": user}
        for i in range(count)
    ]


def config(folder, backbone, output, **users):
    values = run_values(backbone, folder)
    rows = [row for user in USERS for row in rows_of(user)] + rows_of("rare", 2)
    values["task"]["train"] = str(write_rows(folder / "rows.jsonl", rows))
    del values["task"]["validation"]
    values["train"] |= {"steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "batch_size": 4}
    values["train"]["learning_rate"] = 0.3
    values["users"] = {"column": "who", "shared_steps": 2, "rank": 2, "rows": 2, **users}
    return parse(RunConfig, values | {"output": str(folder / output)})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, a backbone, a config and the result of its run, with three users of four."""
    folder = tmp_path_factory.mktemp("users")
    backbone = make_backbone(folder / "tiny")
    run = config(folder, backbone, "run", test=0.2)
    return folder, backbone, run, train(run, NullReporter())


def vectors_of(library):
    found = {user: load_prompt(library.own_prompt(user)).vectors for user in USERS}
    return found | {"shared": load_prompt(library.shared_prompt).vectors}


def test_a_dry_run_counts_what_users_train(made):
    folder, backbone, run, result = made
    facts = dry_run(run.model_copy(update={"output": str(folder / "dry")}), NullReporter())
    basis = open_library(result["users"]["library"]).basis()
    assert basis is not None and not (folder / "dry").exists()
    # all four users have rows enough; the numbers of each, and the vectors in common
    counted = len(USERS) * 2 + basis.size
    assert facts["trained_parameters"] == result["trainable_parameters"] == counted


def test_a_run_that_was_killed_goes_on_bit_for_bit(made):
    folder, backbone, run, result = made
    other = run.model_copy(update={"output": str(folder / "killed")})
    for at in ("step 2:", 3, 5):  # in the shared run, then in that of users
        with pytest.raises(KeyboardInterrupt):
            train(other, Killer(at))
    again = train(other, NullReporter())
    wanted = vectors_of(open_library(folder / "run" / "users"))
    found = vectors_of(open_library(folder / "killed" / "users"))
    jax.tree.map(np.testing.assert_array_equal, wanted, found)
    basis = [load_file(folder / name / "users" / "basis.safetensors") for name in ("run", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *basis)
    assert again["users"]["validation"] == result["users"]["validation"]
    assert any((wanted[user] != wanted["shared"]).any() for user in USERS)


def test_a_users_prompt_is_a_folder_that_a_server_finds_and_its_name_tells_nothing(made):
    folder, _, run, result = made
    library = open_library(result["users"]["library"])
    names = set(DirectoryStore(library.folder).list())
    assert names == {"shared", *map(library.name_of, USERS)}
    assert (result["users"]["with_prompts"], result["users"]["sharing"]) == (4, 1)
    assert library.prompt_of("rare") == library.prompt_of("nobody") == library.shared_prompt
    assert library.prompt_of("e") == library.own_prompt("e")
    for user in USERS:
        assert library.own_prompt(user).parent == library.folder
    metadata = load_prompt(library.own_prompt("e")).metadata
    assert metadata["task"]["name"] == "mine" and "accuracy" in metadata["test"]
    assert train(run, NullReporter()) == result  # complete


def test_nothing_of_a_user_is_left_when_his_folder_is_gone(made):
    folder, _, _, _ = made
    library = open_library(folder / "run" / "users")
    own = load_prompt(library.own_prompt("b@example.org")).vectors
    assert library.remove("b@example.org") and not library.remove("b@example.org")
    assert library.prompt_of("b@example.org") == library.shared_prompt
    held = [file for file in (folder / "run").rglob("*") if file.is_file()]
    numbers = (own.tobytes(), (own - load_prompt(library.shared_prompt).vectors).tobytes())
    for file in held:
        content = file.read_bytes()
        assert b"b@example.org" not in content and b"three it was" not in content, file
        assert not any(each in content for each in numbers), file
    assert not (folder / "run" / "checkpoints").exists()


def test_a_user_who_comes_later_changes_no_byte_of_others(made):
    folder, _, run, _ = made
    library = open_library(folder / "run" / "users")
    before = {file: file.read_bytes() for file in library.folder.rglob("*") if file.is_file()}
    rows = write_rows(folder / "new.jsonl", rows_of("new", 6))
    added = add_user(library, "new", str(rows))
    assert added["steps"] == library.visits == 3
    shared = load_prompt(library.shared_prompt).vectors
    own = load_prompt(library.prompt_of("new")).vectors
    assert np.abs(own - shared).max() > 0
    change = (own - shared).reshape(1, -1)
    basis = library.basis().reshape(2, -1)  # his change is made of what users have in common
    left = change - np.linalg.lstsq(basis.T, change.T, rcond=None)[0].T @ basis
    assert np.abs(left).max() < 1e-4
    for file, content in before.items():
        assert file.read_bytes() == content
    with pytest.raises(UserError, match="has 4 rows, and a user needs users.min_rows, 5"):
        add_user(library, "few", str(write_rows(folder / "few.jsonl", rows_of("few", 4))))


def test_more_users_in_a_step_than_there_are_is_told(made):
    folder, backbone, _, _ = made
    run = config(folder, backbone, "many", rows=1, min_rows=3)
    run = run.model_copy(update={"train": run.train.model_copy(update={"batch_size": 8})})
    with pytest.raises(UserError, match="rows of 8 users .* and 4 have"):
        train(run, NullReporter())
    assert not (folder / "many").exists()
    with pytest.raises(UserError, match="is no library of users' prompts.*did you mean"):
        open_library(folder / "run")


def test_results_of_users_are_plain_json(made):
    result = json.loads((made[0] / "run" / "result.json").read_text())
    assert {"own_accuracy", "shared_accuracy", "mean_gain", "hurt", "helped"} == set(
        result["users"]["test"]
    )
