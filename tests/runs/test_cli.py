"""The command line as a person uses it: results on standard output, mistakes as one sentence.

Whatever is wrong, the exit code is 2, the last line of standard error says what to mend, nothing is
on standard output, no file is left half-written, and none that was there is lost.
"""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from helpers import CONFIG, copy, make_backbone, make_rows, run_values, write_rows, write_run
from safetensors.numpy import load_file, save_file

import jaxprompt
from jaxprompt import api
from jaxprompt.cli import app
from jaxprompt.cli.options import at_home
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import dump_yaml, load_config
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.inference.engine import num_compilations
from jaxprompt.inference.wording import probabilities
from jaxprompt.methods.artefact import Prompt, load_prompt, save_prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.training.run_dir import check_run, clear_run, open_run

COMMAND = Path(sys.executable).parent / "jaxprompt"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def prompt(backbone, tmp_path_factory):
    """An artefact for the tiny backbone, as training would leave it."""
    folder = tmp_path_factory.mktemp("prompt")
    task = run_values(backbone, folder)["task"]
    known = {"source": str(backbone), "fingerprint": load_backbone(str(backbone)).fingerprint}
    vectors = np.random.default_rng(0).normal(size=(3, CONFIG.d_model)).astype(np.float32)
    save_prompt(folder / "prompt", Prompt(vectors, {"backbone": known, "task": task}))
    return folder / "prompt"


@pytest.fixture
def values(backbone, tmp_path):
    return run_values(backbone, tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process; (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxprompt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def refused(call, tmp_path):
    """Expect a mistake; return its sentence, having checked how it was told and what was left."""

    def files():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def run(*arguments):
        before = files()
        code, out, err = call(*arguments)
        *progress, last = err.strip().splitlines()
        assert code == 2 and out == "", (code, out, err)
        assert last.startswith("error: ") and "Traceback" not in err, err
        assert sum("error" in line for line in progress) == 0, err
        assert files() == before
        return last

    return run


def train(values, tmp_path, *overrides):
    return "train", write_run(tmp_path / "run.yaml", values), *overrides


# -- what works ------------------------------------------------------------------------------------


def test_train_eval_predict_score_inspect(call, values, tmp_path):
    values["task"]["test"] = values["task"]["validation"]
    code, out, err = call(*train(values, tmp_path, "train.steps=2"))
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2 and result["test"]["accuracy"] == result["value"]
    assert "majority class" in err and "validation accuracy" in err
    prompt = tmp_path / "run" / "prompt"
    facts = load_prompt(prompt).metadata
    assert facts["test"] == result["test"] and facts["metrics"] == {"accuracy": result["value"]}
    assert facts["baselines"] == {key: result[key] for key in ("majority", "untuned")}

    code, out, err = call("eval", prompt, "--batch-size", 4)
    assert code == 0 and json.loads(out)["metrics"] == {"accuracy": result["value"]}, err

    rows = [{**row, "label": None, "kept": "é"} for row in make_rows(3)]  # answers are not needed
    source, answers = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    code, out, err = call(
        "predict", prompt, "--input", source, "--output", answers, "--batch-size", 4
    )
    assert (code, out) == (0, ""), err
    found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert all(row["kept"] == "é" and row["prediction"] in ("yes", "no") for row in found)

    pairs = [{"input": "it was good", "target": "yes"}, {"input": "it", "target": ""}]
    source, scores = write_rows(tmp_path / "pairs.jsonl", pairs), tmp_path / "scores.jsonl"
    for options in (("--prompt", prompt), ("--backbone", values["backbone"])):
        code, out, err = call(
            "score", *options, "--input", source, "--output", scores, "--batch-size", 4
        )
        assert (code, out) == (0, ""), err
        found = [json.loads(line) for line in scores.read_text().splitlines()]
        assert [row["tokens"] for row in found] == [2, 1]
        assert all(row["log_likelihood"] < 0 for row in found)

    code, out, err = call("eval", prompt, prompt)
    assert code == 0 and json.loads(out)["vote"] == json.loads(out)["prompts"][1], err
    code, out, err = call("inspect", prompt, "--nearest", 1)
    assert code == 0 and json.loads(out)["length"] == 3, err
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_play_answers_lines_from_a_pipe_as_predict_does(call, prompt, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(6))
    kept = tmp_path / "kept.yaml"
    lines = ["it was good", "/labels one, two", "/labels one, two, three", "/prompt off",
             "/old", "/template {text", "/row 2", "/compare", f"/keep {kept}", "/quit",
             "no"]  # fmt: skip
    compiled = num_compilations()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = call("play", prompt, "--data", rows)
    assert code == 0, err
    assert out.count("error: ") == 1 and "cannot be told apart" in out
    assert resolve_task(load_config(kept).task).labels == ["yes", "no"]
    session = api.open_session(prompt)
    (found,) = api.predict(session, [{"text": "it was good"}])
    shares = probabilities(np.array([found["scores"]["yes"], found["scores"]["no"]]))
    assert f"{shares.max():.1%}" in out
    # one program with the prompt, one without, and one for the rows that are compared
    assert num_compilations() - compiled <= 4


def test_the_installed_command_answers_without_heavy_libraries():
    if not COMMAND.exists():
        pytest.skip("the package is not installed as a command beside this Python")
    found = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0
    for name in ("train", "eval", "predict", "score", "inspect"):
        assert name in found.stdout
    heavy = {"jax", "numpy", "datasets", "transformers", "pydantic", "yaml"}
    light = f"import sys, jaxprompt.cli.app; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "none.yaml"], "error: No config file at 'none.yaml'"),
        (["eval", "none"], "error: There is no prompt at 'none'"),
        (["train", "a.yaml", "--fast"], "No such option"),
        (["tune", "a.yaml"], "No such command 'tune'"),
        (["score", "--input", "a.jsonl"], "Missing option '--output'"),
        (["eval", "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ],
)
def test_as_a_process_of_its_own(arguments, words, tmp_path):
    if "none" in arguments[1] or arguments[0] == "tune":
        if not COMMAND.exists():
            pytest.skip("the package is not installed as a command beside this Python")
        command = [COMMAND, *arguments]
    else:
        command = [sys.executable, "-m", "jaxprompt.cli.app", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert found.returncode == 2 and found.stdout == ""
    assert words in found.stderr and "Traceback" not in found.stderr
    if words.startswith("error"):
        assert len(found.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "a.yaml", "--train.steps=10"], "without dashes: train.steps=10."),
        (["train", "a.yaml", "--train.steps", "10"], "without dashes: train.steps=VALUE."),
        (["plan", "a.yaml", "--backbone=x"], "without dashes: backbone=x."),
        (
            ["reproduce", "length", "--train.max_eval_examples=5"],
            "without dashes: train.max_eval_examples=5.",
        ),
    ],
)
def test_settings_that_are_typed_as_options(refused, arguments, words):
    sentence = refused(*arguments)
    assert "No such option: --" in sentence and sentence.endswith(words)


class XlaRuntimeError(RuntimeError):
    """As JAX's is called."""


class SafetensorError(Exception):
    """As the library's is called."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "The memory ran out (of this machine); lower train.micro_batch_size"),
        (XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
         "The memory ran out (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); lower"),
        (SafetensorError("I/O error: No space left"), "cannot be read or written: I/O error"),
        (OSError(28, "No space left on device", "x"), "error: No space left on device: x"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_one_sentence(refused, prompt, monkeypatch, error, words):
    from jaxprompt import api

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(api, "open_session", fails)
    assert words in refused("eval", prompt)


def test_a_fault_of_ours_shows_where_it_is_and_what_to_report(call, prompt, monkeypatch):
    from jaxprompt import api

    monkeypatch.setattr(api, "open_session", lambda *_, **__: {}["no such key"])
    code, out, err = call("eval", prompt)
    assert (code, out) == (1, "") and "Traceback" in err and "KeyError: 'no such key'" in err
    assert err.splitlines()[-1].startswith("This is a fault of jaxprompt (version 0.1.0, Python 3.")


def test_the_version_and_the_devices_are_told(call, prompt, backbone, tmp_path):
    assert call("--version") == (0, f"jaxprompt {jaxprompt.__version__}\n", "")
    source = write_rows(tmp_path / "pairs.jsonl", [{"input": "it was good", "target": "yes"}])
    code, _, err = call("score", "--prompt", prompt, "--input", source, "--output", "/dev/null")
    assert code == 0 and f"computing on {len(jax.devices())} x cpu" in err


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    """As in ``jaxprompt --help | head -1``."""
    command = [sys.executable, "-m", "jaxprompt.cli.app", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.stderr == ""


# -- configuration and data ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.step=3", "Unknown config key 'train.step'; did you mean 'steps'"),
        ("train.steps=many", "Config key 'train.steps' is 'many': input should be a valid integer"),
        ("train.seed=-1", "Config key 'train.seed' is -1"),
        ("train.batch_size=1000000000", "Config key 'train.batch_size' is 1000000000"),
        ("task.metrics=[accuracy, blue]", "asks for metric 'blue'; known are accuracy, f1"),
        ("task.labels=[]", "different ones are needed"),
        ("task.labels=[yes, no, yes]", "different ones are needed"),
        ("task.template=hello", "template 'hello' names no column"),
        ("task.template='{text} {'", "a brace without its partner"),
        ("task.template='{sentence}'", "needs column 'sentence', which row 1 of "),
        ("task.target='{answer}'", "needs column 'answer', which row 1 of "),
        ("task.labels=[yes, maybe]", "has the label 'no'; allowed are 'yes', 'maybe'"),
        ("task.train=", "names no train data; give task.train"),
        ("task.validation=", "names no validation data; give task.validation"),
        ("task.validation=none.jsonl", "There is no file 'none.jsonl'"),
        ("task.test=none.jsonl", "There is no file 'none.jsonl'"),
        ("task.source=builtin:none", "no built-in split none/"),
        ("task=xyzzy", "Task 'xyzzy' is unknown; known are"),
        ("prompt.init=file", "init=file needs prompt.file; give it"),
        ("train.batch_size=6", "train.batch_size is 6, which 4 data-parallel devices do not"),
        ("mesh.data=3", "does not cover 4 device(s)"),
        ("mesh.tensor=4", "mesh.tensor is 4, which does not divide the 2 heads of"),
        ("backbone=./nowhere", "there is no directory ./nowhere"),
    ],
)
def test_mistakes_in_a_run_are_told_before_it_starts(refused, values, tmp_path, override, words):
    sentence = refused(*train(values, tmp_path, override))
    assert words in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("task.labels=[yes, no, zzz]", "Label 'zzz' has no token of this backbone"),
        ("task.max_target_length=1", "has 2 tokens with EOS and task.max_target_length is 1"),
        ("task.template='[prompt:2] {text}'", "places 2 virtual tokens and the prompt has 3"),
        ("prompt={init: file, file: none}", "There is no prompt at 'none'"),
        ("prompt={init: sampled_vocabulary, vocabulary: 2}", "all of them special ids"),
    ],
)
def test_mistakes_that_only_the_backbone_reveals(refused, values, tmp_path, override, words):
    assert words in refused(*train(values, tmp_path, override))
    assert not (tmp_path / "run").exists()


def test_a_prompt_of_another_length_does_not_start_a_run(refused, values, prompt, tmp_path):
    values["prompt"] = {"length": 5, "init": "file", "file": str(prompt)}
    sentence = refused(*train(values, tmp_path))
    assert "has 3 vectors and prompt.length is 5; set prompt.length=3, or" in sentence


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", "a.jsonl holds no rows"),
        ("a.jsonl", b'{"text": "a", "label": "yes"}\n{"text": ', "a.jsonl, line 2, column 10: not"),
        ("a.jsonl", b"[]\n", "a.jsonl, line 1: expected an object"),
        ("a.jsonl", b"\xff\xfe\n", "a.jsonl is not UTF-8"),
        ("a.csv", b"text,label\nx\n", "a.csv, line 2: 1 cells, and the header has 2"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet"),
        ("a.txt", b"hello\n", "must end in .jsonl"),
        ("a.jsonl", b'{"text": null, "label": "yes"}\n', "'text' is empty (null) in row 1 of"),
        ("a.jsonl", b'{"text": "\\ud800", "label": "yes"}\n', "is not Unicode"),
        ("a.jsonl", b'{"text": "a", "label": "oui"}\n', "row 1 of"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_data_stops_a_run_before_it_starts(
    refused, values, tmp_path, name, content, words, split
):
    (tmp_path / name).write_bytes(content)
    values["task"][split] = str(tmp_path / name)
    assert words in refused(*train(values, tmp_path))
    assert not (tmp_path / "run").exists()


# -- where a run goes ------------------------------------------------------------------------------


def test_an_output_that_is_something_else_is_left_alone(refused, values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "exists and is not a run; choose another output" in refused(*train(values, tmp_path))
    values["output"] = str(tmp_path / "train.jsonl")
    assert "exists and is not a run" in refused(*train(values, tmp_path))
    values["output"] = str(tmp_path / "train.jsonl" / "run")
    assert "cannot be written" in refused(*train(values, tmp_path))


def test_settings_of_the_user_in_a_folder_of_other_things_are_left_alone(refused, values, tmp_path):
    """A file that has all of a run's keys is not enough: `output=.` beside one's own config."""
    home = tmp_path / "home"
    home.mkdir()
    text = "# mine\n" + dump_yaml(parse(RunConfig, values | {"output": str(home)}))
    (home / "config.yaml").write_text(text)
    (home / "notes.txt").write_text("mine")
    assert "exists and is not a run" in refused("train", home / "config.yaml")
    (home / "notes.txt").rename(home / ".config.yaml-0123456789ab.part")  # of a killed run
    check_run(load_config(home / "config.yaml"))


def test_a_run_with_other_settings_is_left_alone(refused, values, tmp_path):
    file = write_run(tmp_path / "run.yaml", values)
    with open_run(load_config(file)) as folder:
        (folder / "checkpoints" / "0").mkdir(parents=True)
    sentence = refused("train", file, "train.learning_rate=0.5", "task.name=other")
    assert "task.name was 'mine' and is 'other'; train.learning_rate was 0.3 and is 0.5" in sentence
    (folder / "config.yaml").write_text("task: [")
    assert "holds a run, and its config.yaml is damaged" in refused("train", file)


def test_a_run_that_never_started_may_change_its_settings(values, tmp_path):
    file = write_run(tmp_path / "run.yaml", values)
    with open_run(load_config(file)):
        pass
    changed = load_config(file, ["train.learning_rate=0.5"])
    with open_run(changed) as folder:
        assert load_config(folder / "config.yaml") == changed


def test_what_a_run_wrote_is_cleared_and_nothing_else(tmp_path):
    for name in ("config.yaml", "metrics.jsonl", "notes.txt", ".prompt@3", "prompt/a", "mine/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    clear_run(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert left == {"config.yaml", "notes.txt", "mine", "mine/b"}


def test_two_runs_in_one_directory_refuse_each_other(refused, values, tmp_path):
    file = write_run(tmp_path / "run.yaml", values)
    with open_run(load_config(file)) as folder:
        sentence = refused("train", file, "train.learning_rate=0.5")
        assert f"process {os.getpid()} on " in sentence and "is at work in" in sentence
        assert load_config(folder / "config.yaml") == load_config(file)  # the owner's
    assert not (folder / "lock").exists()


# -- backbones and prompts -------------------------------------------------------------------------


def predict(prompt, tmp_path, *options):
    source = write_rows(tmp_path / "in.jsonl", make_rows(2))
    (tmp_path / "out.jsonl").write_text("answers of yesterday\n")
    return "predict", prompt, "--input", source, "--output", tmp_path / "out.jsonl", *options


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_backbone(refused, values, backbone, tmp_path, size):
    broken = copy(backbone, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    values["backbone"] = str(broken)
    assert "model.safetensors" in refused(*train(values, tmp_path))


def test_backbone_of_other_shapes(refused, values, backbone, tmp_path):
    broken = copy(backbone, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["shared.weight"] = tensors["shared.weight"][:, :-1].copy()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    values["backbone"] = str(broken)
    assert "shared.weight" in refused(*train(values, tmp_path))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_executed(refused, values, backbone, tmp_path, zipped):
    trace = tmp_path / "executed"
    broken = copy(backbone, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    data = pickle.dumps({"shared.weight": Trap(trace)}, protocol=2)
    if zipped:
        with zipfile.ZipFile(broken / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:
        (broken / "pytorch_model.bin").write_bytes(data)
    values["backbone"] = str(broken)
    assert "pytorch_model.bin" in refused(*train(values, tmp_path))
    assert not trace.exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_backbone(refused, values, backbone, tmp_path, missing):
    broken = copy(backbone, tmp_path / "broken")
    (broken / missing).unlink()
    values["backbone"] = str(broken)
    sentence = refused(*train(values, tmp_path))
    assert str(broken) in sentence
    assert (missing in sentence) or missing == "model.safetensors"


def test_truncated_prompt(refused, prompt, tmp_path):
    broken = copy(prompt, tmp_path / "prompt")
    file = broken / "prompt.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "prompt.safetensors is damaged or missing" in refused(*predict(broken, tmp_path))


def test_wrong_backbone_for_a_prompt(refused, prompt, tmp_path):
    other = make_backbone(tmp_path / "other", seed=1)
    sentence = refused(*predict(prompt, tmp_path, "--backbone", other))
    assert "other weights; name the right backbone with --backbone, or allow" in sentence


def test_prompt_of_another_width_is_refused_even_by_force(refused, prompt, backbone, tmp_path):
    facts = load_prompt(prompt).metadata
    save_prompt(tmp_path / "wide", Prompt(np.ones((3, 20), np.float32), facts))
    sentence = refused(*predict(tmp_path / "wide", tmp_path, "--any-backbone"))
    assert "vectors of 20 numbers" in sentence and "d_model 16" in sentence


def test_foreign_prompts_need_a_backbone_and_a_task(refused, backbone, tmp_path):
    np.save(tmp_path / "p.npy", np.ones((3, CONFIG.d_model), np.float32))
    sentence = refused(*predict(tmp_path / "p.npy", tmp_path))
    assert "name it with --backbone" in sentence
    sentence = refused(*predict(tmp_path / "p.npy", tmp_path, "--backbone", backbone))
    assert "name one with --task" in sentence


def test_predict_checks_its_input_and_output_first(refused, prompt, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", make_rows(2))
    sentence = refused(
        "predict", prompt, "--input", source, "--output", tmp_path / "no" / "o.jsonl"
    )
    assert "cannot be written; name a file in a directory that exists" in sentence
    sentence = refused("predict", prompt, "--input", source, "--output", tmp_path)
    assert "cannot be written" in sentence
    sentence = refused("predict", prompt, "--input", tmp_path / "x.jsonl", "--output", "o.jsonl")
    assert "There is no file" in sentence
    write_rows(source, [{"text": "a"}, {"txt": "a"}])
    sentence = refused("predict", prompt, "--input", source, "--output", tmp_path / "o.jsonl")
    assert "needs column 'text', which row 2 of " in sentence and "it has 'txt'" in sentence


def test_eval_and_score_name_what_is_wrong(refused, prompt, tmp_path):
    assert "--split is 'dev'; allowed are train" in refused("eval", prompt, "--split", "dev")
    assert "names no test data; give task.test, or a file with --data" in refused(
        "eval", prompt, "--split", "test"
    )
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "a", "label": "oui"}])
    sentence = refused("eval", prompt, "--data", bad)
    assert f"row 1 of {bad} has the label 'oui'" in sentence
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"input": "a", "target": "b"}, {"input": 3}])
    sentence = refused("score", "--prompt", prompt, "--input", pairs, "--output", tmp_path / "o")
    assert "Row 2 of" in sentence and "has no text in 'input'" in sentence
    assert "Task 'supersens' is unknown; did" in refused("eval", prompt, "--task", "supersens")


def test_an_export_is_all_that_others_need(call, prompt, backbone, tmp_path):
    code, out, err = call("export", prompt, "--output", tmp_path / "known")
    assert code == 0, err
    assert json.loads(out) == {
        "adapter": str(tmp_path / "known" / "adapter"), "library": "PEFT", "backbone": str(backbone)
    }  # fmt: skip
    assert os.listdir(tmp_path / "known") == ["adapter"]
    code, out, err = call(
        "export", prompt, "--output", tmp_path / "x", "--backbone", "builtin-small"
    )
    assert code == 0, err
    base = json.loads((tmp_path / "x" / "adapter" / "adapter_config.json").read_text())
    written = load_backbone(base["base_model_name_or_path"])
    known = load_backbone("builtin-small")
    jax.tree.map(np.testing.assert_array_equal, written.params, known.params)
    assert written.fingerprint == known.fingerprint
    words = [load_tokenizer(b.path).encode("a cat of the forest") for b in (written, known)]
    assert words[0] == words[1]
    assert {p.name for p in (tmp_path / "x" / "backbone").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_a_study_does_not_begin_among_other_things(refused, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "report.md").write_text("mine")
    sentence = refused("reproduce", "length", "--output", tmp_path / "home")
    assert "holds other things (['report.md']) and no study" in sentence
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused("reproduce", "length", "--output", tmp_path / "file")


def answers(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_no_rows_are_answered_as_no_rows(call, refused, prompt, tmp_path, ending):
    source, output = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    source.write_text("" if ending == "jsonl" else "text,input,target,label\n")
    where = "--input", source, "--output", output
    for command in (("predict", prompt, *where), ("score", "--prompt", prompt, *where)):
        output.write_text("of yesterday")
        code, out, err = call(*command)
        assert (code, out, output.read_text()) == (0, "", ""), err
    assert "holds no rows" in refused("eval", prompt, "--data", source)


@pytest.mark.parametrize(
    "rows, words",
    [
        (["Who is it"], "Rows are mappings, .* one is 'Who is it'"),
        ("Who is it", "one is 'Who is it'"),
        ({"text": "Who is it"}, "one is {'text': 'Who is it'}"),
        ([{"text": "a"}, ["b"]], r"one is \['b'\]"),
        ((row for row in [{"text": "a"}]), "one is <generator"),
    ],
)
def test_rows_from_python_are_mappings(prompt, rows, words):
    for ask in (jaxprompt.predict, lambda _, rows: api.score(None, rows)):  # pyright: ignore
        with pytest.raises(UserError, match=words):
            ask(prompt, rows)


def test_scores_that_are_no_numbers_are_told(prompt):
    """Weights that became NaN after they were loaded; a file with NaN is refused already."""
    session = api.open_session(prompt)
    assert jaxprompt.predict(session, []) == [] and api.score(session, []) == []
    head = session.engine.params["head"]
    params = session.engine.params | {"head": head.at[0, 0].set(np.nan)}
    session = session._replace(engine=session.engine._replace(params=params))
    greedy = session.prompt.metadata["task"] | {"decoding": "greedy"}
    asked = [
        lambda: jaxprompt.predict(session, make_rows(3)),
        lambda: jaxprompt.predict(session, make_rows(3), task=greedy),
        lambda: jaxprompt.evaluate(session),
        lambda: api.evaluate_ensemble([session, session]),
        lambda: api.score(session, [{"input": "a", "target": "yes"}]),
    ]
    for ask in asked:
        with pytest.raises(UserError, match="scores that are not finite numbers for"):
            ask()
    with pytest.raises(UserError, match="needs prompts; give the sessions"):
        api.evaluate_ensemble([])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("eval", "p", "--batch-size", 10**9), "less than or equal to 65536"),
        (("reproduce", "length", "--seeds", 10**9), "--seeds is 1000000000; give a number from 1 "),
        (("plan", "run.yaml", "--inputs", 10**18), "less than or equal to 1048576"),
        (("plan", "run.yaml", "--devices", 10**18), "less than or equal to 65536"),
    ],
)
def test_numbers_beyond_all_use_are_refused_with_the_largest(call, tmp_path, arguments, words):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and words in err


def test_answers_that_cannot_be_written_are_kept_and_it_says_where(
    call, prompt, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device", "out.jsonl")

    monkeypatch.setattr(os, "replace", full)
    code, out, err = call(*predict(prompt, tmp_path))
    assert (code, out) == (2, "")
    (kept,) = tmp_path.glob("out-*.jsonl")
    last = err.splitlines()[-1]
    assert "out.jsonl' cannot be written (No space left on device); the 2 rows are in" in last
    assert str(kept) in last and all("scores" in row for row in answers(kept))
    assert (tmp_path / "out.jsonl").read_text() == "answers of yesterday\n"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_format_of_answers_is_what_the_name_of_the_output_says(call, prompt, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", make_rows(2))
    found = {}
    for ending in ("jsonl", "csv", "parquet"):
        code, out, err = call(
            "predict", prompt, "--input", source, "--output", tmp_path / f"o.{ending}"
        )
        assert (code, out) == (0, ""), err
        found[ending] = list(read_rows(None, str(tmp_path / f"o.{ending}")))
    assert found["parquet"] == found["jsonl"]
    for plain, row in zip(found["csv"], found["jsonl"], strict=True):
        scores = {f"score:{label}": str(value) for label, value in row.pop("scores").items()}
        assert plain == row | scores
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"input": "it was good", "target": "yes"}])
    code, out, err = call("score", "--prompt", prompt, "--input", pairs, "--output", "/dev/stdout")
    assert code == 0, err


def test_half_a_surrogate_in_a_column_costs_no_answer(call, prompt, tmp_path):
    rows = [{"text": "it was good", "other": "\ud800"}, {"text": "a", "\udfff": 1}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    code, out, err = call("predict", prompt, "--input", source, "--output", tmp_path / "o.jsonl")
    assert (code, out) == (0, ""), err
    found = answers(tmp_path / "o.jsonl")
    assert [{key: row[key] for key in old} for row, old in zip(found, rows, strict=True)] == rows
    assert all(row["prediction"] in ("yes", "no") for row in found)


def test_an_output_that_would_cost_the_user_data_is_refused(refused, prompt, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", make_rows(2))
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    for name in ("in.jsonl", "link.jsonl"):
        sentence = refused("predict", prompt, "--input", source, "--output", tmp_path / name)
        assert "in.jsonl' itself, which is needed to make it; name another output" in sentence
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"input": "a", "target": "b"}])
    sentence = refused("score", "--prompt", prompt, "--input", pairs, "--output", pairs)
    assert "pairs.jsonl' itself" in sentence
    own = copy(prompt, tmp_path / "prompt")
    (own / "rows").hardlink_to(source)
    sentence = refused("predict", own, "--input", pairs, "--output", own / "rows")
    assert "itself" in sentence
    write_rows(source, [{"text": "a"}, {"text": "a", "prediction": "mine"}])
    sentence = refused("predict", prompt, "--input", source, "--output", tmp_path / "o.csv")
    assert "Row 2 has a column 'prediction' already, which would be overwritten" in sentence
    sentence = refused("predict", prompt, "--input", source, "--output", tmp_path / "o.txt")
    assert "let it end in .jsonl, .csv, .tsv, .parquet" in sentence
    sentence = refused("inspect", prompt, "--figure", tmp_path / "x.foo")
    assert "x.foo'; let it end in .png, .svg, .pdf" in sentence


def test_an_interrupt_says_how_to_go_on(values, tmp_path, monkeypatch, capsys):
    from jaxprompt.training import loop

    def interrupted(config, bar, signals):
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "train", interrupted)
    monkeypatch.setattr(sys, "argv", ["jaxprompt", *map(str, train(values, tmp_path))])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code and signal.getsignal(signal.SIGINT) is before
    assert "stopped by SIGINT; run the same command again to go on" in capsys.readouterr().err


def test_every_path_of_a_command_is_expanded(monkeypatch, tmp_path, call):
    paths = 0
    for command in app.app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(get_args(hint)[:1]):
                assert get_args(hint)[1].callback is at_home, (command.callback, name)
                paths += 1
    assert paths >= 10
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home(["~/a", "b"]) == [tmp_path / "a", Path("b")]
    code, _, err = call("reproduce", "report", "--output=~/none")
    assert code == 2 and str(tmp_path / "none") in err


def test_a_report_and_a_figure_of_each_label(call, refused, prompt, tmp_path):
    figure = tmp_path / "confusion.png"
    code, out, err = call("eval", prompt, "--report", "--figure", figure)
    assert code == 0, err
    report = json.loads(out)["report"]
    assert set(report["classes"]) == {"yes", "no"} and figure.stat().st_size > 0
    assert "precision" in err and "columns: the prediction" in err
    assert "are of one prompt" in refused("eval", prompt, prompt, "--report")
    assert "is not read as a standard stream" in refused("eval", prompt, "--figure", "-")


def test_rows_in_memory_are_judged_like_those_of_a_file(prompt, tmp_path):
    rows = make_rows(6)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    ours, theirs = (api.evaluate(prompt, data=data) for data in (rows, str(file)))
    assert ours["metrics"] == theirs["metrics"] and ours["report"] == theirs["report"]
    assert ours["data"] == "the given rows" and theirs["data"] == str(file)


def test_a_dry_run_checks_all_and_writes_nothing(call, refused, values, tmp_path):
    arguments = train(values, tmp_path)
    code, out, err = call(*arguments, "--dry-run")
    assert code == 0, err
    report = json.loads(out)
    assert report["tasks"]["mine"]["splits"]["train"]["rows"] > 0
    assert report["trained_parameters"] == 3 * CONFIG.d_model and "nothing was written" in err
    assert not (tmp_path / "run").exists()
    assert "needs column 'other'" in refused(*arguments, "task.template={other}", "--dry-run")
