import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    RUN_SUMS,
    Killer,
    assert_same_sums,
    make_backbone,
    metrics,
    run_values,
    write_run,
)
from helpers import run_config as config
from helpers_data import make_tokenizer

from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import dump_yaml, load_config
from jaxprompt.data.references import references
from jaxprompt.data.tasks.splits import read_split
from jaxprompt.inference.ensemble import vote
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.fingerprint import fingerprint
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.run_dir import check_run


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def uninterrupted(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = train(config(backbone, folder, train={"tensorboard": True}))
    return folder / "run", result


def test_a_run_leaves_everything_that_it_promises(uninterrupted, backbone):
    folder, result = uninterrupted
    needed = (
        "task metric value majority best_step steps seconds examples_per_second "
        "trainable_parameters frozen_parameters prompt"
    ).split()
    assert all(result[key] is not None for key in needed)
    assert result == json.loads((folder / "result.json").read_text())
    assert result["trainable_parameters"] == 3 * 16 and result["majority"] == 0.5
    for name in ("config.yaml", "curves.png", "prompt/README.md", "tensorboard", "checkpoints"):
        assert (folder / name).exists(), name
    assert [row["step"] for row in metrics(folder) if "validation/accuracy" in row] == [4, 8, 12]
    size = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
    assert size < 200_000  # a checkpoint never holds the backbone


def test_evaluating_the_artefact_gives_the_figure_of_the_run(uninterrupted):
    folder, result = uninterrupted
    report = api.evaluate(folder / "prompt")
    assert report["metrics"] == {result["metric"]: result["value"]}
    facts = load_prompt(folder / "prompt").metadata
    assert facts["metrics"] == report["metrics"] and facts["step"] == result["best_step"]
    assert report["illegal"] == 0 and sum(report["predicted"].values()) == report["rows"]
    counts = np.array(report["report"]["confusion"]["counts"])
    assert counts[:, :-1].sum(axis=0).tolist() == list(report["predicted"].values())
    assert counts.diagonal().sum() / report["rows"] == result["value"]


def test_a_confusion_matrix_is_drawn_where_a_task_has_labels(uninterrupted, tmp_path):
    session = api.open_session(uninterrupted[0] / "prompt")
    api.evaluate(session, figure=tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    free = api.prompt_task(session.prompt, None).model_copy(update={"labels": None})
    with pytest.raises(UserError, match="has no labels, so there is no confusion matrix"):
        api.evaluate(session, task=free, figure=tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_answers_that_are_written_freely_may_be_no_label(uninterrupted):
    prompt = uninterrupted[0] / "prompt"
    task = api.prompt_task(load_prompt(prompt), None).model_copy(update={"decoding": "greedy"})
    session = api.open_session(prompt)
    report = api.evaluate(session, task=task)
    rows = read_split(task, "validation")
    written = [found["prediction"] for found in api.predict(session, rows, task=task)]
    counts = {label: written.count(label) for label in task.labels}
    assert report["predicted"] == counts
    assert report["illegal"] == pytest.approx(1 - sum(counts.values()) / len(rows))
    right = [w == r.text for w, r in zip(written, references(task, rows), strict=True)]
    assert report["metrics"]["accuracy"] == sum(right) / len(rows)


def test_training_leaves_the_backbone_alone(uninterrupted, backbone):
    facts = load_prompt(uninterrupted[0] / "prompt").metadata
    again = load_backbone(str(backbone))
    assert facts["backbone"]["fingerprint"] == again.fingerprint == fingerprint(again.params)


@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_killed_and_started_again_the_prompt_is_bit_identical(
    uninterrupted, backbone, tmp_path, step
):
    run = config(backbone, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(run, Killer(step))
    result = train(run)
    whole, again = (load_prompt(f / "prompt") for f in (uninterrupted[0], tmp_path / "run"))
    np.testing.assert_array_equal(whole.vectors, again.vectors)
    assert metrics(uninterrupted[0]) == metrics(tmp_path / "run")
    assert result["value"] == uninterrupted[1]["value"]


POPULATION = {"seed": [0, 3], "learning_rate": [0.3, 0.02], "init": ["class_labels", "uniform"]}


@pytest.fixture(scope="module")
def population(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("population")
    run = config(backbone, folder, prompt={"population": POPULATION})
    return run, train(run)


def test_prompts_of_a_population_are_those_of_lone_runs(population, backbone, tmp_path):
    run, result = population
    rows = result["population"]
    assert [{k: row[k] for k in POPULATION} for row in rows] == run.choices() and len(rows) == 8
    for k in (1, 6):  # in both seeds, rates and ways to start apart
        member = run.members()[k].model_copy(update={"output": str(tmp_path / str(k))})
        alone = train(member)
        assert (alone["value"], alone["best_step"]) == (rows[k]["value"], rows[k]["best_step"])
        folder = Path(run.output) / "population" / str(k)
        mine, other = (load_prompt(f / "prompt") for f in (folder, tmp_path / str(k)))
        assert_same_sums(mine.vectors, other.vectors, RUN_SUMS)
        assert mine.metadata["seed"] == member.train.seed
        assert mine.metadata["config"]["train"] == member.model_dump()["train"]


def test_dropout_is_the_same_in_a_population_and_alone(backbone, tmp_path):
    """Other draws would differ in the first digit."""
    run = config(
        backbone, tmp_path, prompt={"population": {"seed": [0, 3]}}, model={"dropout": 0.1}
    )
    train(run)
    member = run.members()[1].model_copy(update={"output": str(tmp_path / "alone")})
    train(member)
    folders = Path(run.output) / "population" / "1", tmp_path / "alone"
    mine, other = (load_prompt(folder / "prompt").vectors for folder in folders)
    assert_same_sums(mine, other, RUN_SUMS)
    assert np.abs(mine - load_prompt(folders[0].parent / "0" / "prompt").vectors).max() > 0.1


def test_the_best_prompt_of_a_population_is_the_runs(population):
    run, result = population
    values = [row["value"] for row in result["population"]]
    best = max(values)
    folder = Path(run.output)
    assert result["value"] == best == api.evaluate(folder / "prompt")["metrics"]["accuracy"]
    kept = load_prompt(folder / "prompt").vectors
    same = [
        np.array_equal(kept, load_prompt(folder / "population" / str(k) / "prompt").vectors)
        for k in range(len(values))
    ]
    assert values[same.index(True)] == best
    assert load_prompt(folder / "prompt").metadata["step"] == result["best_step"]
    assert len((folder / "population.md").read_text().splitlines()) == 2 + len(values)


def test_the_worse_half_of_a_population_stops_and_a_kill_changes_nothing(backbone, tmp_path):
    settings = {
        "prompt": {"population": {"seed": [0, 1, 2, 3, 4]}},
        "train": {"successive_halving_every": 4, "checkpoint_every": 3},
    }
    whole = train(config(backbone, tmp_path / "whole", **settings))
    rows = whole["population"]
    assert sorted(row["steps"] for row in rows) == [4, 4, 8, 12, 12]
    stopped = [max(r["value"] for r in rows if r["steps"] == n) for n in (4, 8, 12)]
    assert stopped[2] == max(stopped)
    run = config(backbone, tmp_path / "killed", **settings)
    for step in (5, 10):
        with pytest.raises(KeyboardInterrupt):
            train(run, Killer(step))
    again = train(run)
    assert again["population"] == rows
    a, b = (load_prompt(Path(r["prompt"])).vectors for r in (whole, again))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": {"population": {"speed": [1]}}}, "speed"),
        ({"prompt": {"population": {"seed": []}}}, "one or more different"),
        ({"prompt": {"population": {"seed": [1, 1]}}}, "one or more different"),
        ({"prompt": {"population": {"learning_rate": [0.1, -1]}}}, "'train.learning_rate' is -1"),
        ({"prompt": {"population": {"init": ["class_labels", "best"]}}}, "'prompt.init' is 'best'"),
        ({"prompt": {"population": {"init": ["text"]}}}, "needs prompt.text"),
        ({"method": "model-tuning", "prompt": {"population": {"seed": [1, 2]}}}, "has none"),
        ({"train": {"successive_halving_every": 3}}, "multiple of train.evaluate_every, 4"),
        ({"train": {"micro_batch_size": 3}}, "use a divisor of it"),
        ({"train": {"successive_halving_every": 4}}, "for prompt.population, and there is none"),
    ],
)
def test_populations_and_parts_that_cannot_be(backbone, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        config(backbone, tmp_path, **settings)


def test_nothing_is_compiled_after_the_first_evaluation(backbone, tmp_path):
    """Rows of one length: another step or evaluation brings no other shape."""
    import jax

    compiled, seen = [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )

    class Watcher(NullReporter):
        def step(self, done, rates):
            seen[done] = len(compiled)

    try:
        # a bound of its own, so that no other test has compiled its shapes
        train(config(backbone, tmp_path, prompt={"length": 5}), Watcher())
    finally:
        jax.monitoring.clear_event_listeners()
    assert 0 < seen[5] == seen[11] == seen[12]


def test_kill_minus_nine(uninterrupted, backbone, tmp_path):
    config(backbone, tmp_path)  # writes the rows
    values = run_values(backbone, tmp_path)
    values["train"] |= {"steps": 12, "evaluate_every": 4, "checkpoint_every": 5}
    file = write_run(tmp_path / "run.yaml", values)
    command = [sys.executable, "-m", "jaxprompt.cli.app", "train", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and '"step": 4' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train(load_config(file))
    again = load_prompt(tmp_path / "run" / "prompt")
    np.testing.assert_array_equal(load_prompt(uninterrupted[0] / "prompt").vectors, again.vectors)


def test_a_complete_run_is_not_run_again(uninterrupted, backbone):
    folder, result = uninterrupted
    before = (folder / "metrics.jsonl").read_text()
    assert train(load_config(folder / "config.yaml")) == result
    assert (folder / "metrics.jsonl").read_text() == before


def test_more_steps_go_on_where_the_run_ended(backbone, tmp_path, uninterrupted):
    train(config(backbone, tmp_path, train={"steps": 7}))
    train(config(backbone, tmp_path, train={"steps": 12}))
    again = load_prompt(tmp_path / "run" / "prompt")
    if again.metadata["step"] == uninterrupted[1]["best_step"]:  # step 7 was evaluated here only
        np.testing.assert_array_equal(
            load_prompt(uninterrupted[0] / "prompt").vectors, again.vectors
        )
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12


def test_other_settings_are_refused(uninterrupted, backbone):
    folder, _ = uninterrupted
    with pytest.raises(UserError, match=r"train.learning_rate was 0.3 and is 0.5"):
        train(load_config(folder / "config.yaml", ["train.learning_rate=0.5"]))


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(uninterrupted, tmp_path):
    config_file = uninterrupted[0] / "config.yaml"
    run = load_config(config_file, [f"output={tmp_path / 'run'}"])
    (tmp_path / "run/checkpoints/5").mkdir(parents=True)
    # the axes of its mesh had other names, too
    lines = dump_yaml(run).replace("fsdp:", "model:").splitlines(True)
    old = [line for line in lines if "bottleneck" not in line and "tensor:" not in line]
    assert len(old) == len(lines) - 2
    (tmp_path / "run/config.yaml").write_text("".join(old))
    again = lambda *more: check_run(load_config(config_file, [f"output={run.output}", *more]))
    assert again() == again("task.beams=4") == tmp_path / "run"
    with pytest.raises(UserError, match=r"prompt.bottleneck was 128 and is 7"):
        again("prompt.bottleneck=7")
    with pytest.raises(UserError, match=r"task.beams was 4 and is 5"):
        again("task.beams=5")


def test_patience_stops_a_run_that_does_not_improve(backbone, tmp_path):
    stuck = {"learning_rate": 1e-9, "evaluate_every": 1, "patience": 3, "weight_decay": 0.0}
    result = train(config(backbone, tmp_path, train=stuck))
    assert result["stopped_early"] and result["best_step"] == 1 and result["steps"] == 4


def test_a_loss_that_is_not_finite_stops_the_run(backbone, tmp_path):
    with pytest.raises(UserError, match="lower train.learning_rate"):
        train(config(backbone, tmp_path, train={"learning_rate": 1e38, "clip": 0}))


def test_a_tuned_model_is_a_backbone(backbone, tmp_path):
    tuning = {"optimizer": "adamw", "learning_rate": 1e-2, "steps": 8}
    result = train(config(backbone, tmp_path, method="model-tuning", train=tuning))
    assert result["prompt"] is None and result["frozen_parameters"] == 0
    task = load_config(tmp_path / "run" / "config.yaml").task
    report = api.evaluate(None, backbone=result["model"], task=task)
    assert report["metrics"]["accuracy"] == result["value"]


def test_a_prompt_starts_from_a_prompt(uninterrupted, backbone, tmp_path):
    file = {"init": "file", "file": str(uninterrupted[0] / "prompt")}
    train(config(backbone, tmp_path, prompt=file, train={"steps": 1, "learning_rate": 1e-9}))
    np.testing.assert_allclose(
        load_prompt(tmp_path / "run" / "prompt").vectors,
        load_prompt(uninterrupted[0] / "prompt").vectors,
        rtol=1e-4,
    )


def test_predict_and_score_agree(uninterrupted):
    session = api.open_session(uninterrupted[0] / "prompt")
    rows = [{"text": "one it was good"}, {"text": "two three it was bad"}]
    found = api.predict(session, rows)
    pairs = [{"input": f"question : {row['text']}", "target": "yes"} for row in rows]
    scored = api.score(session, pairs)
    for answer, row in zip(found, scored, strict=True):
        assert answer["scores"]["yes"] == pytest.approx(row["log_likelihood"], rel=1e-4)
        assert answer["prediction"] == max(answer["scores"], key=answer["scores"].get)
        assert row["tokens"] == 2


def test_a_prompt_refuses_another_backbone(uninterrupted, tmp_path):
    other = make_backbone(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="other weights"):
        api.open_session(uninterrupted[0] / "prompt", str(other))
    assert api.open_session(uninterrupted[0] / "prompt", str(other), any_backbone=True).length == 3


def test_an_ensemble_answers_as_its_prompts_do_alone(uninterrupted, tmp_path):
    folder = uninterrupted[0]
    session = api.open_session(folder / "prompt")
    rng = np.random.default_rng(0)
    prompts = [session.prompt] + [
        session.prompt._replace(vectors=rng.normal(size=(3, 16)).astype(np.float32))
        for _ in range(2)
    ]
    sessions = [api.open_session(p, session.backbone) for p in prompts]
    report = api.evaluate_ensemble(sessions, batch_size=8)
    alone = [api.evaluate(s)["metrics"] for s in sessions]
    assert report["prompts"] == alone and report["best"] == max(m["accuracy"] for m in alone)
    task = api.prompt_task(session.prompt, None)
    rows = read_split(task, "validation")
    each = [[found["prediction"] for found in api.predict(s, rows)] for s in sessions]
    texts = [r.text for r in references(task, rows)]
    right = [v == t for v, t in zip(vote(each), texts, strict=True)]
    assert report["vote"]["accuracy"] == sum(right) / len(rows)
    assert set(report["likelihood"]) == {"accuracy"}
    one = api.evaluate_ensemble(sessions[:1])
    assert one["vote"] == one["likelihood"] == alone[0]
    longer = session.prompt._replace(vectors=np.zeros((4, 16), np.float32))
    with pytest.raises(UserError, match=r"have one length; these have \[3, 4\]"):
        api.evaluate_ensemble([session, api.open_session(longer, session.backbone)])
    facts = session.prompt.metadata
    renamed = session.prompt._replace(metadata=facts | {"task": facts["task"] | {"name": "other"}})
    with pytest.raises(UserError, match="for one task; these are for .*other.*--task"):
        api.evaluate_ensemble([session, api.open_session(renamed, session.backbone)])
    with pytest.raises(UserError, match="share one loaded backbone"):
        api.evaluate_ensemble([session, api.open_session(session.prompt)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_map", {"yes": "no", "no": "yes"}),
        ("template", "subject : {text}"),
        ("labels", ["no", "yes"]),
        ("separator", " it"),
        ("max_input_length", 4),
        ("decoding", "greedy"),
    ],
)
def test_prompts_that_are_asked_in_different_forms_are_no_ensemble(uninterrupted, key, value):
    session = api.open_session(uninterrupted[0] / "prompt")
    facts = session.prompt.metadata

    def other(**changes):
        prompt = session.prompt._replace(metadata=facts | {"task": facts["task"] | changes})
        return api.open_session(prompt, session.backbone)

    with pytest.raises(
        UserError, match=rf"task.{key} is .* to prompt 1 and .* to prompt 3.*--task"
    ):
        api.evaluate_ensemble([session, session, other(**{key: value})])
    # what they learnt from and are judged by may differ, and a task that is named is that of all
    alone = api.evaluate(session)["metrics"]
    both = api.evaluate_ensemble([session, other(train="elsewhere.csv", metrics=["macro_f1"])])
    assert both["prompts"] == [alone, alone]
    named = api.evaluate_ensemble([session, other(**{key: value})], task=facts["task"])
    assert named["prompts"] == [alone, alone]


def test_prompts_of_different_tokenizers_are_no_ensemble(uninterrupted, tmp_path):
    session = api.open_session(uninterrupted[0] / "prompt")
    make_tokenizer(tmp_path, words=["other", "words"])
    strange = api.open_session(session.prompt, session.backbone, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="these have different tokenizers.*--tokenizer"):
        api.evaluate_ensemble([session, strange])


def test_inspect_names_the_words_of_a_prompt_made_of_words(backbone, tmp_path):
    start = {"init": "text", "text": "good bad yes"}
    run = config(backbone, tmp_path, prompt=start, train={"steps": 1, "learning_rate": 1e-9})
    train(run)
    session = api.open_session(tmp_path / "run" / "prompt")
    report = api.inspect(session, nearest=2, figure=tmp_path / "figure.png")
    nearest = [vector["nearest"][0] for vector in report["vectors"]]
    assert [session.tokenizer.encode(w) for w in ("good", "bad", "yes")] == [
        [session.tokenizer.encode(entry["word"].lstrip("▁"))[0]] for entry in nearest
    ]
    assert all(entry["cosine"] > 0.999 for entry in nearest)
    # where the start came from a text, labels are found where their words stand
    found = {label: where["positions"] for label, where in report["labels"].items()}
    assert 2 in found["yes"]
    assert (tmp_path / "figure.png").stat().st_size > 1000
