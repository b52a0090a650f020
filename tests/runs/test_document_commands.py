"""The commands and the Python of the documents, really run: on tiny rows and a tiny backbone.

What is added to a command makes it small. Those in ``PARSED_ONLY`` are not run; ``tests/README.md``
says why, and ``test_documents.py`` parses them all the same.
"""

import importlib.util
import json
import re
import sys

import pandas
import pytest
from helpers import ROOT, make_backbone, make_rows, write_rows

from jaxprompt.cli import app

PARSED_ONLY = (
    ("serve runs/", "it ends only when it is told to"),
    ("train spam ", "it makes what the server serves"),
    ("push ", "network"),
    ("user add ", "a library of users; test_users.py makes one"),
    ("runs/my/users", "a library of users; test_users.py makes one"),
    ("train configs/paper/base.yaml", "network"),
    ("train.trackers=", "libraries that are not installed"),
    ("population={task: ", "minutes: two built-in data sets in full"),
    ("$common", "minutes; test_methods.py and test_soft_verbalizer.py train the methods"),
    ("reproduce ", "minutes to hours; test_studies.py runs the studies"),
    ("compare formulations.yaml", "minutes; test_compare.py runs one"),
    ("pretrain configs/pretrain/adapt.yaml", "a corpus; test_pretrain.py adapts a backbone"),
    ("pretrain configs/pretrain/masked.yaml", "a corpus; test_masked.py trains such a backbone"),
)
# what the forms in capital letters stand for
FORMS = {
    "FILE": "reviews.csv", "CONFIG.yaml": "form.yaml", "PROMPT": "runs/quickstart/prompt",
    "FOLDER": "adapter", "B": "tiny", "PATH_OR_HUB_ID": "tiny", "LORA": "lora/prompt",
    "MODEL": "merged",
}  # fmt: skip
SMALL = [
    "backbone=tiny", "model.dtype=float32", "model.unroll=false", "prompt.length=2",
    "task.train=rows.csv", "task.validation=rows.csv", "task.test=rows.csv",
    "task.labels=[yes, no]", "task.max_input_length=16", "train.steps=1", "train.batch_size=8",
    "train.eval_batch_size=8", "train.evaluate_every=1", "train.checkpoint_every=1",
    "train.tensorboard=false",
]  # fmt: skip
SMALL_PRETRAINING = [
    "shape.d_model=16", "shape.num_heads=2", "shape.d_ff=24", "shape.num_encoder_layers=1",
    "shape.num_decoder_layers=1", "tokenizer.vocabulary=240", "input_length=16",
    "target_length=16", "validation=0.1", "model.dtype=float32", "model.unroll=false",
    "train.steps=1", "train.batch_size=4", "train.warmup_steps=0", "train.evaluate_every=1",
    "train.evaluate_batches=1", "train.tensorboard=false",
]  # fmt: skip


def load_documents():
    """The module of tests/unit that finds commands in documents."""
    path = ROOT / "tests" / "unit" / "test_documents.py"
    spec = importlib.util.spec_from_file_location("documents", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


documents = load_documents()


def commands():
    """Each command of the documents once, in their order, without those that only name one."""
    lines = [line for path in documents.DOCUMENTS for line in documents.commands(path)]
    given = [documents.arguments(line) for line in dict.fromkeys(lines)]
    forms = [[FORMS.get(word, word) for word in words] for words in given if words]
    wanted = [words for words in forms if len(words) > 1 and "--help" not in words]
    return list(dict.fromkeys(map(tuple, wanted)))


def why_not(words) -> str | None:
    return next((why for part, why in PARSED_ONLY if part in f"{' '.join(words)} "), None)


def made_small(words):
    if words[0] == "train":
        if not any(word.startswith("method=") for word in words):
            return [*words, *SMALL]
        # each in a folder of its own, and of a rank that the tiny backbone has
        folder = re.sub(r"\W+", "-", " ".join(words))
        return [*words, *SMALL, f"output=runs/{folder}", "lora.rank=2"]
    return [*words, *SMALL_PRETRAINING] if words[0] == "pretrain" else list(words)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with all that the documents name."""
    make_backbone(tmp_path / "tiny")
    rows = [{**row, "gloss": row["text"], "passage": f"{i} {row['text']}", "question": "it"}
            for i, row in enumerate(make_rows(40))]  # fmt: skip
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame[["passage", "label"]].to_csv(tmp_path / "reviews.csv", index=False)
    frame[["passage"]].to_csv(tmp_path / "new.csv", index=False)
    write_rows(tmp_path / "in.jsonl", rows)
    write_rows(tmp_path / "pairs.jsonl", [{"input": "it was good", "target": "yes"}])
    lines = [f"{chr(97 + i % 26) * (i % 5 + 2)} runs to {i}" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["jaxprompt", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        assert not stop.value.code, f"jaxprompt {' '.join(words)}\n{err}"
        return out

    return run


# some train a config with another method, whose recipe replaces the config's, with a warning
@pytest.mark.filterwarnings("ignore:.*a recipe of its own:FutureWarning")
def test_the_commands_of_the_documents_run(place, call):
    call("train", "quickstart", *SMALL)  # what scripts/quickstart.sh has done
    call("train", "quickstart", *SMALL, "method=lora", "output=lora")
    call("init", "reviews.csv", "--output", "my.yaml")
    call("train", "my.yaml", *SMALL)
    ran = [made_small(words) for words in commands() if why_not(words) is None]
    for words in ran:
        call(*words)
    assert len(ran) >= 15
    for name in ("prompt.png", "answers.csv", "out.csv", "scores.jsonl", "adapter", "reviews.yaml",
                 "merged"):  # fmt: skip
        assert (place / name).exists(), name
    assert json.loads((place / "runs" / "sweep" / "result.json").read_text())["steps"] == 1


def test_what_is_not_run_is_still_in_a_document_and_told_of():
    told = (ROOT / "tests" / "README.md").read_text()
    for part, _ in PARSED_ONLY:
        assert any(part in f"{' '.join(words)} " for words in commands()), part
        assert re.split("[ =]", part)[0] in told, part


def test_the_python_of_the_first_document_runs(place, capsys):
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    first = first.replace('"train.steps=200"', "*SMALL")
    first = first.replace('load_backbone("builtin")', 'load_backbone("tiny")')
    exec(first, {"SMALL": SMALL})
    assert "majority class" in capsys.readouterr().out
    assert (place / "runs" / "example" / "peft" / "adapter_config.json").is_file()
    frame = pandas.DataFrame(make_rows(40))
    names = {
        "train_frame": frame, "validation_frame": frame, "jp": sys.modules["jaxprompt"],
        "SMALL": {
            "backbone": "tiny", "prompt": {"length": 2}, "model": {"unroll": False},
            "train": {"steps": 1, "batch_size": 8, "eval_batch_size": 8, "tensorboard": False},
        },
    }  # fmt: skip
    second = second.replace('["good", "bad"]', '["yes", "no"]')
    second = second.replace("jp.train(config,", "jp.train(config | SMALL,")
    exec(second, names)
    assert (place / "runs" / "mine" / "prompt").is_dir()
