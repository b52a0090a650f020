"""Old spellings of settings are read with a warning; names of other libraries get a hint."""

from typing import Any

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.names import ALIASES, RENAMED, current_names, recorded_names
from jaxprompt.config.overrides import dump_yaml, load_config, set_value
from jaxprompt.config.reference import settings
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse

VALUES: dict[str, Any] = {
    "model.weights": "int8",
    "train.eval_rows": 7,
    "train.halve_every": 1000,
    "train.length_window": 16,
    "train.micro_batch": 4,
}


def run(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"task": "spam", "output": "a"} | sections


def value_of(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def with_old(key: str) -> dict[str, Any]:
    section, _, name = key.partition(".")
    grid = {"population": {"seed": [0, 1]}} if name == "halve_every" else {}
    return run(**{"prompt": grid, section: {name: VALUES[key]}})


@pytest.mark.parametrize("key", RENAMED)
def test_an_old_spelling_means_the_new_key_and_warns(key):
    with pytest.warns(FutureWarning, match=f"'{key}' is now '{RENAMED[key]}'; rename it"):
        config = parse(RunConfig, with_old(key))
    assert value_of(config, RENAMED[key]) == VALUES[key]
    assert key.rpartition(".")[2] + ":" not in dump_yaml(config)


@pytest.mark.parametrize("key", RENAMED)
def test_what_a_run_recorded_is_read_without_a_warning(key):
    config = parse(RunConfig, recorded_names(with_old(key)))
    assert value_of(config, RENAMED[key]) == VALUES[key]


def test_an_override_wins_over_the_file_in_either_spelling(tmp_path):
    for old_in_file in (True, False):
        name, key = "eval_rows", "train.max_eval_examples"
        if not old_in_file:
            name, key = "max_eval_examples", "train.eval_rows"
        path = tmp_path / "run.yaml"
        path.write_text(f"task: spam\noutput: a\ntrain: {{{name}: 5}}\n")
        with pytest.warns(FutureWarning, match="'train.eval_rows' is now"):
            config = load_config(path, [f"{key}=9"])
        assert config.train.max_eval_examples == 9


@pytest.mark.parametrize("key", RENAMED)
def test_both_spellings_in_one_place_are_an_error(key):
    section, _, name = key.partition(".")
    new = RENAMED[key].rpartition(".")[2]
    with pytest.raises(UserError, match="old and the new name of one setting; leave out the old"):
        parse(RunConfig, run(**{section: {name: VALUES[key], new: VALUES[key]}}))


def test_a_file_with_both_spellings_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: spam\noutput: a\ntrain: {eval_rows: 5, max_eval_examples: 5}\n")
    with pytest.raises(UserError, match=r"run\.yaml: 'train\.eval_rows' and .* the old one\.$"):
        load_config(path)


def test_other_values_are_left_as_they_are():
    values = {"task": {"weights": 1}, "train": 5, "weights": 2, "model": None}
    assert current_names(values) == values


def test_an_override_of_an_old_key_is_set_under_the_new_one():
    values: dict[str, Any] = {}
    with pytest.warns(FutureWarning):
        set_value(values, "model.weights=int8")
    assert values == {"model": {"quantization": "int8"}}


def test_old_and_foreign_names_lead_to_settings_that_exist():
    keys = {setting.key for setting in settings()}
    assert {*RENAMED.values(), *ALIASES.values()} <= keys
    assert not keys & RENAMED.keys()
    assert not keys & {f"{key.partition('.')[0]}.{name}" for name, key in ALIASES.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (run(train={"lr": 0.1}), "'train.lr'; it is called 'train.learning_rate' here"),
        (run(prompt={"num_virtual_tokens": 9}), "it is called 'prompt.length' here"),
        (run() | {"output_dir": "x"}, "it is called 'output' here"),
        (run() | {"learning_rate": 0.1}, "did you mean 'train.learning_rate'"),
        (run(train={"step": 1}), "did you mean 'steps'"),
    ],
)
def test_unknown_keys_get_a_hint(values, message):
    with pytest.raises(UserError, match=message):
        parse(RunConfig, values)
