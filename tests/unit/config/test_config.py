"""The schema of a run: YAML 1.2 words and numbers, overrides, and one sentence for each mistake."""

from typing import Any

import jax
import pytest
from helpers import ROOT

from jaxprompt.config import overrides, yaml12
from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.overrides import (
    dump_yaml,
    load_config,
    override_value,
    read_config,
    read_yaml,
    set_value,
)
from jaxprompt.config.paths import expanded
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import PromptConfig, RunConfig, TaskConfig, TrainConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.models.checkpoints.hub import resolve
from jaxprompt.models.t5 import t5
from jaxprompt.models.t5.config import released
from jaxprompt.runtime.cache import cache_folder

MINIMAL = "task: supersense\noutput: runs/a\n"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text, value",
    [
        ("[yes, no, on, off, y, n]", ["yes", "no", "on", "off", "y", "n"]),
        ("[true, False, TRUE]", [True, False, True]),
        ("[3e-4, 1E5, -.5, 1., +2.5e+1, .inf]", [3e-4, 1e5, -0.5, 1.0, 25.0, float("inf")]),
        ("[010, 0x1F, 0o17, -3, +3]", [10, 31, 15, -3, 3]),
        ("[1:30, 2024-01-01, 1_000, 0b1]", ["1:30", "2024-01-01", "1_000", "0b1"]),
        ("[~, null, '']", [None, None, ""]),
        ("[=, <<, 1.2.3, e5, .e5, '3']", ["=", "<<", "1.2.3", "e5", ".e5", "3"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_yaml(text, "here")
    assert found == value and list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1, 2", "here is not valid YAML: .*line 1"),
        ("a: 1\nb: 2\na: 3", "key 'a' is given twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("9" * 5000, "here is not valid YAML"),
        ("[" * 1500, "here is not valid YAML"),
        ("a: \x00", "here is not valid YAML"),
        ("!!bool foo", "'foo' is tagged as true or false and is none"),
        ("!!float ''", "'' is tagged as a number and is none"),
        ("!!null foo", "'foo' is tagged as null and is none"),
        ("!!int {a: b}", "a mapping is tagged as a whole number"),
        ("!!int '5_0'", "'5_0' is tagged as a whole number"),
        ("!!map [a]", "a list is tagged as a mapping"),
        ("!!seq {a: b}", "here is not valid YAML"),
        ("!!timestamp abc", "could not determine a constructor"),
        ("!!timestamp 2024-01-01", "could not determine a constructor"),
        ("!!binary aGk=", "could not determine a constructor"),
        ("!!merge <<: {a: 1}", "could not determine a constructor"),
        ("0x" + "F" * 5000, "a number of 5002 digits is too large"),
        ("{[a]: b}", "a list or mapping cannot be a key"),
        ("{1: a, 0x1: b}", "key '1' is given twice"),
        ("a: &a [*a]", "nested deeper than 100 levels"),
        ("a: 1 #" + "x" * 10**6, "has 1000006 characters, and 262144 are allowed"),
    ],
)
def test_bad_yaml_is_one_sentence_and_executes_nothing(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_aliases_of_aliases_are_counted_before_anything_is_made_of_them(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match="holds more than 100000 values, .* aliases included") as at:
        load_config(write(tmp_path, MINIMAL + "\n".join([*lines, "backbone: *a9"])))
    assert len(str(at.value)) < 300
    merged = ["a0: &a0 {k: v}"]
    merged += [f"a{i}: &a{i} {{!!merge <<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)]
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml("\n".join(merged), "here")


def test_an_override_of_what_an_alias_shares_changes_one_place():
    values = read_yaml("a: &x {k: 1}\nb: *x", "here")
    set_value(values, "a.k=2")
    assert values == {"a": {"k": 2}, "b": {"k": 1}}


def test_a_file_that_is_no_config_is_not_parsed(tmp_path):
    with pytest.raises(UserError, match="run.yaml has 2000000 bytes, more than any config"):
        load_config(write(tmp_path, "x" * 2_000_000))


def test_any_text_survives_being_written(tmp_path):
    pieces = [*"\x85\u2028\u2029\ufeff\r\n\t #a'\"\x00\x1b\xa0\ud800é\U0001f600|\\%@{", ": ", "- "]
    texts = [a + b + c for a in pieces for b in pieces for c in ("", "x", "\n")]
    assert yaml12.load(yaml12.dump(texts[:800])) == texts[:800]
    task = {"name": "t", "template": "{a}\x85{b}", "separator": "\u2028x\r"}
    config = parse(RunConfig, {"task": task, "output": "a"})
    assert load_config(write(tmp_path, dump_yaml(config))) == config


def test_labels_and_rates_of_a_file_mean_what_they_say(tmp_path):
    text = """
task: {name: mine, train: t.jsonl, template: "{text}", labels: [yes, no]}
train: {learning_rate: 3e-4, steps: 10}
output: runs/mine
"""
    config = load_config(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert config.task["labels"] == ["yes", "no"]
    assert config.train.learning_rate == 3e-4 and config.train.steps == 10
    assert config.prompt == PromptConfig()


def test_what_is_written_is_read_back_equal(tmp_path):
    words = ["yes", "3e-4", "1:30", "010", "0o7", "true", "null", "", " x", "é", "2024-01-01", "="]
    task: dict[str, Any] = {"name": "1e5", "template": "{a}: #{b}\n- c", "labels": words}
    config = parse(
        RunConfig, {"task": task, "output": "3e1", "train": {"weight_decay": 1e-5, "z_loss": 1e20}}
    )
    assert load_config(write(tmp_path, dump_yaml(config))) == config


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL + "train: {steps: 5}\n")
    config = load_config(
        path,
        ["train.steps=7", "train.learning_rate=1e-3", "prompt.length=8", "task.max_input_length=64",
         "task.labels=[yes, no]", "output=a=b", "train.patience="],
    )  # fmt: skip
    assert config.train.steps == 7 and config.train.learning_rate == 1e-3
    assert config.train.patience is None
    assert config.task == {"name": "supersense", "max_input_length": 64, "labels": ["yes", "no"]}
    assert config.prompt.length == 8 and config.output == "a=b"


@pytest.mark.parametrize(
    "text, value",
    [
        ("#x", "#x"),
        ("is it? # no", "is it? # no"),
        ("question: {text}", "question: {text}"),
        ("{text}", "{text}"),
        ("{a}{b}", "{a}{b}"),
        ("{{x}} {text}", "{{x}} {text}"),
        ("[prompt:10] {text} It was [prompt:2]", "[prompt:10] {text} It was [prompt:2]"),
        ("'tis {text}", "'tis {text}"),
        ('"Hi" said {who}', '"Hi" said {who}'),
        ("a\nb", "a\nb"),
        ("  {text} ", "  {text} "),
        (" ", " "),
        ("- a", "- a"),
        ("*", "*"),
        ("&a b", "&a b"),
        ("!!int 5", "!!int 5"),
        ("| x", "| x"),
        ("a=b", "a=b"),
        ("@x", "@x"),
        ("", None),
        ("null", None),
        ("true", True),
        (" 3 ", 3),
        ("3e-4", 3e-4),
        ("'5'", "5"),
        ("''", ""),
        (r'"\n"', "\n"),
        ("[yes, 'no', 1]", ["yes", "no", 1]),
        ("[[1, 2], []]", [[1, 2], []]),
        ("{name: boolq, prefix: true}", {"name": "boolq", "prefix": True}),
        ("{}", {}),
    ],
)
def test_an_override_is_what_was_typed(text, value):
    found = override_value(text, "key")
    assert found == value and type(found) is type(value)
    values: dict[str, Any] = {}
    set_value(values, f"task.template={text}")
    assert values == {"task": {"template": value}}


def test_an_override_reaches_into_lists():
    values = {"text": [{"name": "a", "train": "x"}, {"name": "b"}]}
    set_value(values, "text.1.train=own.txt")
    set_value(values, "text.0.weight=2")
    assert values["text"] == [
        {"name": "a", "train": "x", "weight": 2}, {"name": "b", "train": "own.txt"}
    ]  # fmt: skip
    for part in ("2", "-1", "x", "9" * 5000):
        with pytest.raises(UserError, match="no item of a list of 2; items are numbered from 0"):
            set_value(values, f"text.{part}.train=y")


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.steps", "Override 'train.steps' must have the form key=value, e.g. train.steps"),
        ("=3", "must have the form key=value"),
        ("output.path=3", "Override 'output.path': 'output' is 'runs/a', which has no keys inside"),
        ("train.step=3", "Unknown config key 'train.step'; did you mean 'steps'"),
        ("train.steps=[1", "The value of 'train.steps' is not valid YAML"),
        ("train..steps=3", "Unknown config key 'train.'"),
        ("task={a}", "lacks|Unknown|task"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        config = load_config(write(tmp_path, MINIMAL), [override])
        parse(TaskConfig, config.task, "task.")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No config file at .*give the path of a YAML file"),
        ("", "must hold a mapping of keys, such as 'task: supersense'"),
        ("- a\n- b\n", "must hold a mapping"),
        ("task: [", "run.yaml is not valid YAML"),
        (b"task: \xff\n", "run.yaml cannot be read as UTF-8"),
        ("output: runs/a\n", "The config lacks 'task'; add it"),
        ("task: spam\n", "The config lacks 'output'; add it"),
        (MINIMAL + "lenght: 3\n", "Unknown config key 'lenght'; allowed are backbone, .*task,"),
        (MINIMAL + "trian: {}\n", "Unknown config key 'trian'; did you mean 'train'"),
        (MINIMAL + "prompt: {lenght: 3}\n", "key 'prompt.lenght'; did you mean 'length'"),
        (MINIMAL + "train: 5\n", "Config key 'train' is 5: input should be a valid dictionary"),
        (MINIMAL + "train: {steps: ten}\n", "Config key 'train.steps' is 'ten': .* valid integer"),
        (MINIMAL + "train: {steps: 1.5}\n", "Config key 'train.steps' is 1.5: .* valid integer"),
        (MINIMAL + "train: {steps: true}\n", "Config key 'train.steps' is True: .*integer"),
        (MINIMAL + "train: {optimizer: sgd}\n", "'train.optimizer' is 'sgd': .*'adafactor-t5x'"),
        (MINIMAL + "model: {remat: maybe}\n", "Config key 'model.remat' is 'maybe': .*boolean"),
        ("task: 123\noutput: a\n", "Config key 'task' is 123: input should be text; put it in"),
        ("task: spam\noutput: 2024\n", "Config key 'output' is 2024: input should be text"),
        (MINIMAL + "1: 2\n", "Unknown config key '1'; allowed are backbone"),
    ],
)
def test_every_mistake_in_a_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and "pydantic" not in text


def test_a_directory_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match="No config file at"):
        load_config(tmp_path)


def test_several_mistakes_are_all_named_in_one_sentence():
    with pytest.raises(UserError) as caught:
        parse(RunConfig, {"task": 1, "train": {"steps": "5", "sed": 1}})
    text = str(caught.value)
    for key in ("'task'", "'output'", "'train.steps'", "'train.sed'"):
        assert text.count(key) == 1
    assert text.count(".\n") == 0 and text.endswith(".")


@pytest.mark.parametrize(
    "schema, key, value",
    [
        (TrainConfig, "seed", -1),  # neither NumPy's nor JAX's generators take these seeds
        (TrainConfig, "seed", 2**32),
        (TrainConfig, "seed", 0.5),
        (TrainConfig, "steps", 0),
        (TrainConfig, "steps", 10**30),
        (TrainConfig, "batch_size", 10**9),
        (TrainConfig, "eval_batch_size", -1),
        (TrainConfig, "warmup_steps", -1),
        (TrainConfig, "learning_rate", 0),
        (TrainConfig, "learning_rate", float("inf")),
        (TrainConfig, "learning_rate", float("nan")),
        (TrainConfig, "z_loss", -0.1),
        (TrainConfig, "weight_decay", float("inf")),
        (PromptConfig, "length", 0),
        (PromptConfig, "length", 10**9),
    ],
)
def test_numbers_out_of_range(schema, key, value):
    with pytest.raises(UserError, match=rf"Config key 'x\.{key}' is {value}: "):
        parse(schema, {key: value}, "x.")


def test_seeds_of_the_whole_range_are_allowed():
    assert parse(TrainConfig, {"seed": 2**32 - 1}).seed == 2**32 - 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": []}, r"'task': labels are \[\], and some different ones are needed; leave"),
        ({"labels": ["a", "b", "a"]}, "'task': labels are .*'a'.*different ones are needed"),
        ({"labels": ["a", " "]}, "one of them is blank"),
        ({"labels": [1, 2]}, "'task.labels.0' is 1: input should be text; put it in quotes"),
        ({"labels": "yes"}, "'task.labels' is 'yes': .*list"),
        ({"label_map": {0: "a"}}, "'task.label_map.0' is 0: input should be text; put it in"),
        ({"template": "question"}, "template 'question' names no column; write one in braces"),
        ({"template": "{{text}} {}"}, "names no column"),
        ({"metrics": []}, "Config key 'task.metrics' is .*at least 1 item"),
        ({"max_input_length": 0}, "Config key 'task.max_input_length' is 0: "),
        ({"template": None}, "Config key 'task.template' is None"),
        ({"sauce": "x"}, "Unknown config key 'task.sauce'; did you mean 'source'"),
    ],
)
def test_tasks_that_cannot_be_answered(changes, message):
    with pytest.raises(UserError, match=message):
        parse(TaskConfig, {"name": "mine", "template": "{text}"} | changes, "task.")


def test_numbers_as_labels_are_one_problem_that_names_label_map():
    with pytest.raises(UserError) as caught:
        parse(TaskConfig, {"name": "t", "template": "{a}", "labels": [0, 1, 2, 3]}, "task.")
    text = str(caught.value)
    assert text.count("put it in quotes") == 1 and "and 3 more in 'task.labels'" in text
    assert "label_map" in text


def test_no_sentence_is_endless():
    error = UserError("a" * 10**7 + "; mend it.")
    assert len(str(error)) < 3000 and str(error).endswith("; mend it.")
    assert str(UserError("short")) == "short"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"template": {"question": {"q": None}}},
            "'task.template' is .*YAML reads it as a mapping",
        ),
        ({"train": ["a.jsonl", "b.jsonl"]}, "'task.train' is .*YAML reads it as a list"),
        ({"labels": "yes,no"}, r"'task.labels' is 'yes,no': .*list, as in \[yes, no\]"),
    ],
)
def test_values_of_another_form_say_which(changes, message):
    with pytest.raises(UserError, match=message):
        parse(TaskConfig, {"name": "t", "template": "{a}"} | changes, "task.")


def test_many_mistakes_are_told_in_a_short_sentence():
    many: dict[str, Any] = {f"k{i}": i for i in range(20_000)} | {"k" * 10**6: 1}
    for values in (many, {"prompt": many}, {"prompt": {"text": ["x"] * 10**6}}):
        with pytest.raises(UserError) as caught:
            parse(RunConfig, {"task": "spam", "output": "a"} | values)
        assert len(str(caught.value)) < 4000
    with pytest.raises(UserError, match="and 19991 more problems"):
        parse(RunConfig, {"task": "spam", "output": "a"} | many)


def test_the_home_directory_is_written_out_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/a/~b") == "/home/me/a/~b" and expanded("~") == "/home/me"
    for path in ("a/~/b", "./~x", "/a", "gs://b/c", "google/t5", "a.jsonl"):
        assert expanded(path) == path
    run = {
        "backbone": "~/m",
        "tokenizer": "~/t",
        "task": "spam",
        "prompt": {"file": "~/p.npy", "population": {"file": ["~/a.npy", "b.npy"]}},
        "output": "~/runs/a",
    }
    config = parse(RunConfig, run)
    assert (config.backbone, config.tokenizer) == ("/home/me/m", "/home/me/t")
    assert (config.output, config.prompt.file) == ("/home/me/runs/a", "/home/me/p.npy")
    assert config.prompt.population["file"] == ["/home/me/a.npy", "b.npy"]
    splits = {split: f"~/{split}.csv" for split in ("train", "validation", "test")}
    task = resolve_task({"name": "t", "template": "{a}"} | splits)
    assert task.train == "/home/me/train.csv" and task.test == "/home/me/test.csv"
    assert task.validation == "/home/me/validation.csv"
    pretraining = {
        "text": [{"name": "a", "train": "~/a.txt"}],
        "pairs": [{"name": "b", "train": "~/b.jsonl"}],
        "tokenizer": "~/t",
        "output": "~/o",
    }
    config = parse(PretrainConfig, pretraining)
    assert config.text[0].train == "/home/me/a.txt" and config.pairs[0].train == "/home/me/b.jsonl"
    assert (config.tokenizer, config.output) == ("/home/me/t", "/home/me/o")
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, MINIMAL)
    assert read_config("~/run.yaml") == {"task": "supersense", "output": "runs/a"}


@pytest.mark.parametrize(
    "path, message",
    [
        ("~nobody-of-this-name/x", "begins with the home directory .*and there is none"),
        ("a\0b", "cannot be the name of a file"),
        ("", "at least 1 character"),
        ("runs/\ud800", "unicode|cannot be the name"),
    ],
)
def test_paths_that_cannot_be(path, message):
    with pytest.raises(UserError, match=message):
        parse(RunConfig, {"task": "spam", "output": path})


def test_a_home_that_is_nobodys_is_a_sentence_in_every_reader(monkeypatch, tmp_path):
    nobody = "~nobody-of-this-name/x"
    for read in (
        lambda: resolve(nobody),
        lambda: load_tokenizer(nobody),
        lambda: cache_folder("a", {"JAXPROMPT_CACHE": nobody}),
        lambda: read_rows(None, nobody + ".jsonl"),
        lambda: read_rows(f"folder:{nobody}", "train"),
        lambda: read_rows(f"hf:{nobody}", "train"),
        lambda: load_config(nobody),
    ):
        with pytest.raises(UserError, match="begins with the home directory"):
            read()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("a", {}) == tmp_path / ".cache" / "jaxprompt" / "a"
    assert cache_folder("a", {"JAXPROMPT_CACHE": "~/c"}) == tmp_path / "c" / "a"
    (tmp_path / "m").mkdir()
    assert resolve("~/m") == str(tmp_path / "m")


@pytest.mark.parametrize("init", ["text", "file"])
def test_an_initialisation_needs_what_it_reads(init):
    with pytest.raises(UserError, match=f"init={init} needs prompt.{init}; give it"):
        parse(RunConfig, {"task": "spam", "output": "a", "prompt": {"init": init}})
    parse(RunConfig, {"task": "spam", "output": "a", "prompt": {"init": init, init: "x"}})


CONFIGS = ROOT / "configs"
RECIPES = sorted(p.stem for p in (CONFIGS / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda p: p.stem)
def test_configurations_that_come_along_are_valid(path):
    if path.parent.name == "pretrain":
        parse(PretrainConfig, read_yaml(path.read_text(), path.name))
    else:
        resolve_task(load_config(path).task)


def test_recipes_of_the_paper_have_its_sizes_and_settings():
    # frozen and trained parameters of Lester et al. 2021, table 4 (small to XXL, 100 vectors)
    table = {"small": (76_961_152, 51_200), "base": (247_577_856, 76_800),
             "large": (783_150_080, 102_400), "xl": (2_849_757_184, 204_800),
             "xxl": (11_135_332_352, 409_600)}  # fmt: skip
    assert RECIPES == sorted(table)
    for size, (frozen, trained) in table.items():
        paper, code = (load_config(CONFIGS / kind / f"{size}.yaml")
                       for kind in ("paper", "authors_code"))  # fmt: skip
        shape = released(paper.backbone)
        leaves = jax.tree.leaves(t5.abstract_params(shape))
        assert sum(leaf.size for leaf in leaves) == frozen
        assert paper.prompt.length * shape.d_model == trained
        # A.1 and table 6: the best of the search
        train = paper.train
        assert (train.learning_rate, train.batch_size, train.steps) == (0.3, 32, 30_000)
        assert train.schedule == "constant" and not train.parameter_scale
        same = {"train": {"steps", "batch_size"}, "model": {"dropout"},
                "prompt": {"init", "uniform", "special_ids"}, "output": True}  # fmt: skip
        assert paper.model_dump(exclude=same) == code.model_dump(exclude=same)
        assert (code.model.dropout, code.prompt.init, code.prompt.uniform) == (
            0.1, "uniform", "code"
        )  # fmt: skip


def test_names_of_released_backbones():
    assert released("google/t5-v1_1-xl") == released("google/t5-xl-lm-adapt")
    for name in ("google/t5-xl", "google/t5-v1_1-xl-lm-adapt", "t5-small", "google/t5-v1_1-11b"):
        assert released(name) is None


def test_a_value_in_a_message_is_bounded_and_so_is_the_work():
    bomb = ["x"] * 10
    for _ in range(12):  # 10^13 words when printed
        bomb = [bomb] * 10
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, {"a": bomb}, "x" * 10**7, 10**5000, list(range(10**6)), bomb[0]):
        assert len(shown(value)) < 450
    for value in ("it's", {"b": 1, "a": [None, 2.5]}, ["x", ("y",)], 7, True, None, b"x"):
        assert shown(value) == repr(value)
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(100_000))).endswith(", 29, ... (100000 in all)")


def test_a_population_has_a_bound():
    grid = {"seed": list(range(400)), "length": list(range(1, 401))}
    values = {"task": "supersense", "output": "x", "prompt": {"population": grid}}
    with pytest.raises(UserError, match="has 160,000 combinations, and at most 1,024 are trained"):
        parse(RunConfig, values)


def test_configs_are_read_from_the_repository_where_the_link_to_them_is_not_kept(
    tmp_path, monkeypatch
):
    package = tmp_path / "jaxprompt"
    (package / "builtin").mkdir(parents=True)
    (package / "builtin" / "configs").write_text("../../configs")
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(overrides, "PACKAGED", overrides._packaged_folder(package))
    assert overrides.packaged_configs() == []
    with pytest.raises(UserError, match="has no configs of its own; give the path of a YAML file"):
        load_config("mine")
    write(tmp_path / "configs", MINIMAL, "mine.yaml")
    assert load_config("mine").output == "runs/a"


def test_a_method_of_the_command_line_brings_its_recipe(tmp_path):
    """The rate of a file suits the method of the file."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: boolq\noutput: x\ntrain: {learning_rate: 0.3, steps: 100, schedule: cosine}\n"
    )
    with pytest.warns(FutureWarning, match="train.learning_rate, train.schedule for another"):
        changed = load_config(file, ["method=lora"])
    assert (changed.train.learning_rate, changed.train.optimizer) == (4e-4, "adamw")
    assert (changed.train.schedule, changed.train.warmup_steps) == ("linear", 6)
    with pytest.warns(FutureWarning, match="train.schedule for another"):
        chosen = load_config(file, ["method=lora", "train.learning_rate=0.002"])
    assert chosen.train.learning_rate == 0.002
    assert load_config(file, ["method=prompt-tuning"]).train.learning_rate == 0.3
    assert load_config(file, ["method=residual-prompt-tuning"]).train.learning_rate == 0.3
