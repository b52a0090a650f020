"""Studies: what they plan, that they resume, what they conclude, what the report says."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_backbone, make_rows, run_values, write_rows
from typer.testing import CliRunner

from jaxprompt.cli import app
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.inference.predict import Predictions
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.runtime.markdown import plain
from jaxprompt.studies import (
    baselines,
    catalogue,
    dept,
    method_costs,
    method_runs,
    method_tables,
    methods,
    runs,
)
from jaxprompt.studies.baselines import calibrated_quality
from jaxprompt.studies.catalogue import STUDIES
from jaxprompt.studies.options import StudyOptions, named, read_overrides
from jaxprompt.studies.report import Section, section, to_markdown, write_report
from jaxprompt.studies.reproduce import make_plan, reproduce
from jaxprompt.studies.runs import (
    RECIPES,
    Run,
    Suite,
    of_method,
    read_records,
    run_config,
    run_suite,
)
from jaxprompt.studies.study import FULL, Hypothesis
from jaxprompt.studies.tasks import mixture, relabelled, with_sentinel
from jaxprompt.training.population import as_markdown

TASK = TaskConfig(
    name="mine", train="a.jsonl", validation="b.jsonl", template="{text}", labels=["no", "yes"]
)


def quiet(text):
    pass


# ---- what is planned


def plan_of(study, recipe):
    options = {"backbones": {"a": "builtin-small", "b": "builtin"}, "recipe": recipe}
    if study == "dept":
        options["backbones"] = {"t5-base": "google-t5/t5-base"}
    if study == "adaptation":
        options["adapted"] = {"a": 0, "b": 100}
    pairs = dict.fromkeys(("transfer", "shift"), ["mrpc", "qqp"]) | {"users": []}  # rows of its own
    tasks = pairs.get(study, ["supersense", "spam"])
    return make_plan(study, StudyOptions(tasks=tasks, **options))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("study", STUDIES)
def test_every_run_of_every_study_is_a_valid_run_of_its_own(study, recipe, tmp_path):
    plan = plan_of(study, recipe)
    variants = STUDIES[study].variants(plan)
    runs = {}
    for run in (run for variant in variants for run in variant.runs):
        assert runs.setdefault(run.key, run) == run  # one key, one run
        assert run.task in plan.tasks
    assert runs
    for run in runs.values():
        if run.method in ("prompt", "full"):
            config = run_config(run, recipe, plan.tasks[run.task], "builtin", tmp_path)
            assert config.train.seed == run.seed
            assert config.train.steps == RECIPES[recipe][run.method]["train.steps"]


@pytest.mark.parametrize("study", STUDIES)
def test_claims_are_about_arms_of_their_study(study):
    variants = STUDIES[study].variants(plan_of(study, "miniature"))
    labels = {variant.label for variant in variants}
    for hypothesis in STUDIES[study].hypotheses:
        assert {hypothesis.left, hypothesis.right} <= labels
        assert hypothesis.sign in "<>~"


def test_levers_change_one_thing_of_the_papers_recipe():
    plan = plan_of("levers", "paper")
    configs = {
        variant.label: run_config(
            variant.runs[0], "paper", plan.tasks["spam"], "x", "y"
        ).model_dump()
        for variant in STUDIES["levers"].variants(plan)
        if variant.group == "spam" and variant.label != FULL
    }
    usual = configs[catalogue.PAPERS]
    assert usual["train"]["schedule"] == "constant" and usual["train"]["learning_rate"] == 0.3
    assert usual["model"]["dropout"] == 0 and usual["train"]["optimizer"] == "adafactor-t5x"
    for label, config in configs.items():
        changed = [
            (part, key)
            for part in ("model", "prompt", "train")
            for key in usual[part]
            if config[part][key] != usual[part][key]
        ] + [("method",)] * (config["method"] != usual["method"])
        assert len(changed) == (
            0 if label == catalogue.PAPERS else 1 + label.count(", linear") + label.count(", rate")
        )


def test_a_study_without_what_it_needs_is_refused():
    small = {"builtin-small": "builtin-small"}
    with pytest.raises(UserError, match="needs --adapted"):
        make_plan("adaptation", StudyOptions(backbones=small))
    with pytest.raises(UserError, match="needs two --task"):
        make_plan("transfer", StudyOptions(backbones=small))
    with pytest.raises(UserError, match="needs --span"):
        make_plan("objective", StudyOptions(backbones={"x": "some/where"}, tasks=["spam"]))
    with pytest.raises(UserError, match="There is no study 'lenght'"):
        make_plan("lenght", StudyOptions(backbones=small))
    with pytest.raises(UserError, match="--adapted names 'c'"):
        make_plan("adaptation", StudyOptions(backbones=small, adapted={"c": 3}))
    with pytest.raises(UserError, match="'dept' needs --backbone"):
        make_plan("dept", StudyOptions(backbones=small))
    with pytest.raises(UserError, match="'bitfitt' is no method"):
        make_plan("methods", StudyOptions(backbones=small, methods=["bitfitt"]))
    with pytest.raises(UserError, match="names 'lora' twice"):
        make_plan("methods", StudyOptions(backbones=small, methods=["lora", "lora"]))
    with pytest.raises(UserError, match="compares no methods"):
        make_plan("length", StudyOptions(backbones=small, methods=["lora"]))
    with pytest.raises(UserError, match="--rows is -4"):
        make_plan("methods", StudyOptions(backbones=small, rows=[-4]))
    with pytest.raises(UserError, match="recipe is 'big'"):
        make_plan("length", StudyOptions(backbones=small, recipe="big"))
    with pytest.raises(UserError, match="transfer needs as many"):
        make_plan("transfer", StudyOptions(backbones=small, tasks=["supersense", "spam"]))
    with pytest.raises(UserError, match="each name once"):
        named(["x/a", "y/a"])
    assert named(["m=x/a", "y/b/"]) == {"m": "x/a", "b": "y/b/"}
    assert read_overrides(["train.steps=3"]) == {"train.steps": 3}
    rates = read_overrides(["prompt:train.learning_rate=0.1", "full:train.learning_rate=3e-5"])
    assert of_method(rates | {"train.max_eval_examples": 9}, "full") == {
        "train.learning_rate": 3e-5, "train.max_eval_examples": 9
    }  # fmt: skip
    assert of_method(rates | {"train.max_eval_examples": 9}, "few") == {
        "train.max_eval_examples": 9
    }
    with pytest.raises(UserError, match="neither prompt nor full"):
        read_overrides(["hard:train.steps=3"])
    with pytest.raises(UserError, match=r"train\.stps"):
        read_overrides(["train.stps=3"])


@pytest.mark.parametrize("name", ["..", "../../x", "a/b", "/etc", "", ".hidden", "a\n", "x" * 101])
def test_names_never_leave_the_output(name, tmp_path):
    folder = tmp_path / "task.yaml"
    folder.write_text(json.dumps({"name": name, "template": "{a}", "labels": ["x", "y"]}))
    with pytest.raises(UserError, match="The task name .* is to be that of a directory"):
        make_plan("length", StudyOptions(backbones={"a": "builtin"}, tasks=[str(folder)]))
    with pytest.raises(UserError, match="The backbone name .* is to be that of a directory"):
        make_plan("length", StudyOptions(backbones={name: "builtin"}))
    for place in ("backbone", "task", "variant"):
        run = Run("a", "b", "prompt", 3, 0, None, {})._replace(**{place: name})
        if place == "variant" and name in ("", "a\n", ".."):
            continue
        with pytest.raises(UserError, match="is to be that of a directory"):
            Suite(tmp_path, {}, {}).folder(run)
    if "=" not in name and name not in ("", "a/b", "/etc", "../../x", "a\n"):
        with pytest.raises(UserError, match="is to be that of a directory"):
            named([f"{name}=somewhere"])
    options = StudyOptions(backbones={"a.b-c": "builtin"}, tasks=["rte"])
    assert not make_plan("length", options).settings


def test_what_is_measured_beside_a_run_is_measured_as_the_run_is():
    settings = read_overrides(
        ["model.dtype=mixed", "prompt:model.quantization=int8", "train.steps=3"]
    )
    kept = {"model.dtype": "mixed"}
    assert of_method(settings, "hard") == of_method(settings, "few") == kept
    assert of_method(settings, "ensemble") == kept | {"model.quantization": "int8"}
    run = Run("a", "b", "prompt", 3, 0, None, of_method(settings, "prompt"))
    assert run.numerics == {"dtype": "mixed", "quantization": "int8"}
    assert run._replace(settings={}).numerics == {"dtype": None, "quantization": None}


# ---- tasks in other forms


def test_a_sentinel_goes_before_each_target():
    changed = with_sentinel(TASK.model_copy(update={"label_map": {"0": "no"}}))
    assert changed.labels == ["<extra_id_0> no", "<extra_id_0> yes"]
    assert changed.label_map == {
        "0": "<extra_id_0> no", "no": "<extra_id_0> no", "yes": "<extra_id_0> yes"
    }  # fmt: skip
    free = with_sentinel(TASK.model_copy(update={"labels": None, "target": "{label}"}))
    assert free.target == "<extra_id_0> {label}"


def test_a_target_task_takes_the_label_words_of_its_source_by_position():
    target = TASK.model_copy(
        update={"labels": ["different", "same"], "label_map": {"0": "different", "1": "same"}}
    )
    changed = relabelled(target, TASK)
    assert changed.labels == ["no", "yes"]
    assert changed.label_map == {"0": "no", "1": "yes", "different": "no", "same": "yes"}
    with pytest.raises(UserError, match="as many"):
        relabelled(target.model_copy(update={"labels": ["a", "b", "c"]}), TASK)


def test_a_mixture_has_all_rows_with_the_names_of_their_tasks(tmp_path):
    values = {"train": str(write_rows(tmp_path / "t.jsonl", make_rows(5)))}
    values["validation"] = str(write_rows(tmp_path / "v.jsonl", make_rows(2)))
    one = TASK.model_copy(update=values)
    two = one.model_copy(update={"name": "other", "template": "say: {text}", "max_input_length": 9})
    mixed, parts = mixture([one, two], tmp_path / "mix")
    rows = [json.loads(line) for line in (tmp_path / "mix/train.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert rows[0] == {"input": "mine: one it was good", "target": "yes"}
    assert rows[5] == {"input": "other: say: one it was good", "target": "yes"}
    assert [task.template for task in parts] == ["mine: {text}", "other: say: {text}"]
    assert mixed.max_input_length == 512 and mixed.labels is None


def test_a_calibrated_figure_is_that_of_the_task_with_calibration(monkeypatch):
    asked = []

    def answers(session, task, rows):
        asked.append(task.calibration)
        return Predictions(["yes"] * len(rows), None)

    monkeypatch.setattr(baselines, "predict_rows", answers)
    session = SimpleNamespace(tokenizer=None)
    rows = [{"text": "x", "label": "yes"}, {"text": "y", "label": "no"}]
    assert calibrated_quality(session, TASK, rows) == 0.5  # type: ignore[arg-type]
    assert calibrated_quality(None, TASK.model_copy(update={"labels": None}), rows) is None  # type: ignore[arg-type]
    assert asked == ["content_free"]


# ---- what is concluded


@pytest.mark.parametrize(
    "left, right, sign, verdict",
    [
        ([0.8, 0.82, 0.81], [0.5, 0.52, 0.51], ">", "holds here"),
        ([0.8, 0.82, 0.81], [0.5, 0.52, 0.51], "~", "does not hold here"),
        ([0.5, 0.7, 0.6], [0.5, 0.6, 0.7], "~", "holds here (+0.000"),
        ([0.5, 0.52], [0.8, 0.9], ">", "does not hold here (-0.340"),
        ([0.5], [0.8, 0.9], "<", "cannot be told from one seed (-0.350)"),
        ([], [0.8, 0.9], ">", "not run"),
    ],
)
def test_a_difference_counts_above_twice_its_standard_error(left, right, sign, verdict):
    assert Hypothesis("a", sign, "b", "").verdict(left, right).startswith(verdict)


def test_a_finding_about_one_group_is_not_said_of_others():
    """Less forgetting is better, and less accuracy is not."""
    anywhere, here = Hypothesis("a", ">", "b", ""), Hypothesis("a", "<", "b", "", "forgetting")
    assert anywhere.is_of("accuracy", ("a", "b")) and anywhere.is_of("forgetting", ("a", "b"))
    assert here.is_of("forgetting", ("a", "b", "c")) and not here.is_of("accuracy", ("a", "b"))
    assert not here.is_of("forgetting", ("a", "c"))


# ---- runs


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A backbone and a task, both tiny, and the settings of runs of a second."""
    folder = tmp_path_factory.mktemp("studies")
    values = run_values(make_backbone(folder / "tiny"), folder)
    file = folder / "mine.yaml"
    file.write_text(json.dumps(values["task"] | {"test": values["task"]["validation"]}))
    settings = {
        "train.steps": 4, "train.batch_size": 8, "train.eval_batch_size": 8, "model.unroll": False,
    }  # fmt: skip
    plan = {"backbones": {"tiny": values["backbone"]}, "tasks": [str(file)], "settings": settings}
    return plan | {"recipe": "miniature", "length": 3, "seeds": 2}


def stripped(records):
    """Records without times."""
    return {
        key: {k: v for k, v in record.items() if not k.endswith("seconds")}
        for key, record in records.items()
    }


def test_an_interrupted_study_ends_as_an_uninterrupted_one(mine, tmp_path):
    plan = make_plan("ensemble", StudyOptions(**mine))
    page, failed = reproduce(plan, tmp_path / "whole", quiet)
    assert failed == 0 and page.is_file()

    def interrupt(text):
        if text.startswith("[2/3]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(make_plan("ensemble", StudyOptions(**mine)), tmp_path / "parts", interrupt)
    assert len(read_records(tmp_path / "parts")) == 1
    with (tmp_path / "parts/cells.jsonl").open("a") as file:
        file.write('{"backbone": "ti')  # a crash cut a line short
    said = []
    reproduce(make_plan("ensemble", StudyOptions(**mine)), tmp_path / "parts", said.append)
    assert said[-1] == "3 runs: 2 measured now, 0 failed"
    whole = read_records(tmp_path / "whole")
    assert stripped(read_records(tmp_path / "parts")) == stripped(whole)
    joint = whole["tiny", "mine", "ensemble", 3, None, None]
    alone = [whole["tiny", "mine", "prompt", 3, seed, None]["test"] for seed in (0, 1)]
    assert joint["prompts"] == alone and joint["mean"] == pytest.approx(np.mean(alone))
    assert (tmp_path / "parts/report.md").read_text() == (tmp_path / "whole/report.md").read_text()

    # prompts that an ensemble needs are made again, and nothing else
    import shutil

    shutil.rmtree(tmp_path / "parts/runs/tiny/mine/prompt-P3-seed1")
    reproduce(make_plan("ensemble", StudyOptions(**mine)), tmp_path / "parts", said.append)
    assert said[-1] == "3 runs: 1 measured now, 0 failed"

    # and the report has it all
    text = (tmp_path / "whole/report.md").read_text()
    vote = re.search(r"\| majority vote \| 1 \| ([\d.]+) \|", text)
    assert vote and float(vote[1]) == pytest.approx(joint["vote"], abs=5e-4)
    assert "Not run: scale, superglue" in text
    assert "data:image/png;base64," in (tmp_path / "whole/report.html").read_text()


def test_a_cell_that_fails_is_noted_and_the_others_go_on(mine, tmp_path):
    plan = make_plan("ensemble", StudyOptions(**mine))
    runs = [
        Run("tiny", "mine", "prompt", length, 0, None, plan.settings | {"prompt.init": init})
        for length, init in ((2, "text"), (2, "uniform"))
    ]
    runs[1] = runs[1]._replace(length=3)
    suite = Suite(tmp_path, plan.backbones, plan.tasks)
    assert run_suite(runs, suite) == 1
    note = json.loads((tmp_path / "errors.jsonl").read_text())
    assert "needs prompt.text" in note["error"]
    assert list(read_records(tmp_path)) == [runs[1].key]


def test_a_cell_keeps_what_is_not_of_its_run_and_tells_what_the_run_warns_of(mine, tmp_path):
    plan = make_plan("length", StudyOptions(**mine))
    settings = plan.settings | {"train.warmup_steps": 9, "model.dtype": "float32"}
    run = Run("tiny", "mine", "prompt", 3, 0, None, settings)
    said: list[str] = []
    suite = Suite(tmp_path, plan.backbones, plan.tasks, illegal_rows=0, say=said.append)
    folder = suite.folder(run)
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert run_suite([run], suite) == 1 and (folder / "notes.txt").read_text() == "mine"
    assert any("FAILED: UserError" in text for text in said)
    (folder / "notes.txt").unlink()
    (folder / "lock").touch()  # killed before anything else was written
    assert run_suite([run], suite) == 0
    assert any(text.startswith("    warning: train.warmup_steps is 9") for text in said)


def test_cells_load_their_backbone_as_their_runs_do(mine, tmp_path, monkeypatch):
    loaded, load = [], runs.load_backbone

    def watched(path, **how):
        loaded.append((path.rpartition("/")[2], how.get("dtype"), how.get("attention")))
        return load(path, **how)

    monkeypatch.setattr(runs, "load_backbone", watched)
    plan = make_plan("length", StudyOptions(**mine))
    settings = plan.settings | {"model.dtype": "bfloat16"}
    todo = [Run("tiny", "mine", "full", None, 0, None, settings | {"train.learning_rate": 1e-3})]
    todo += [Run("tiny", "mine", "hard", None, None, None, of_method(settings, "hard"))]
    todo += [Run("tiny", "mine", "prompt", 3, 0, None, plan.settings)]
    assert run_suite(todo, Suite(tmp_path, plan.backbones, plan.tasks, select_rows=4)) == 0
    assert loaded == [
        ("tiny", "bfloat16", None), ("model", "bfloat16", "causal"), ("tiny", None, None)
    ]  # fmt: skip
    rows = {key[2]: record for key, record in read_records(tmp_path).items()}
    assert set(rows) == {"full", "hard", "prompt"}
    assert len({record["fingerprint"] for record in rows.values()}) == 1


def test_domain_shift_judges_tuned_prompts_and_models_on_the_other_task(mine, tmp_path):
    folder = tmp_path / "other.yaml"
    task = make_plan("ensemble", StudyOptions(**mine)).tasks["mine"]
    folder.write_text(task.model_copy(update={"name": "other"}).model_dump_json())
    options = mine | {"tasks": [*mine["tasks"], str(folder)], "seeds": 1}
    plan = make_plan("shift", StudyOptions(**options))
    _, failed = reproduce(plan, tmp_path / "out", quiet)
    assert failed == 0
    found = read_records(tmp_path / "out")
    assert {key[2] for key in found} == {"prompt", "full"}
    for record in found.values():
        assert record["also"]["other"]["accuracy"] == record["test"]  # the same rows
    part = section(plan, found, tmp_path)
    assert [caption for caption, _ in part.tables] == ["mine (in domain)", "mine -> other"]
    assert part.findings[-1].endswith("(+0.000).") or "one seed" in part.findings[-1]


def test_the_command_says_what_is_wrong_and_reports_without_running(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app.app, ["reproduce", *arguments, "--output", str(tmp_path)])

    for arguments, message in (
        (["report"], "No study was begun"),
        (["adaptation"], "needs --adapted"),
        (["length", "train.stps=1"], "did you mean 'steps'"),
        (["length", "--task", "nothing.yaml"], "No config file"),
        (["adaptation", "--adapted", "x=few"], "whole number"),
        (["adaptation", "--adapted", "x=²"], "whole number"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_the_shipped_results_are_read_by_the_report(tmp_path):
    """RESULTS.md's runs are runs of the studies: nobody has to run them again."""
    from importlib.resources import files

    text = files("jaxprompt").joinpath("builtin/backbones/cells.jsonl").read_text()
    (tmp_path / "cells.jsonl").write_text(text)
    found = read_records(tmp_path)
    assert len(found) == len(text.splitlines())
    names = {"small": "builtin-small", "base": "builtin"}
    settings = {"train.max_eval_examples": 600, "model.dtype": "mixed"}
    plan = make_plan("length", StudyOptions(backbones=names, settings=settings))
    lines = dict((line[0], line[1:]) for line in section(plan, found, tmp_path).tables[0][1])
    assert lines["P = 20"][:2] == ["3", "0.605 ± 0.002"]
    assert lines[FULL][:2] == ["3", "0.834 ± 0.009"]
    (tmp_path / "plans").mkdir()
    (tmp_path / "figures").mkdir(exist_ok=True)
    (tmp_path / "plans/length.json").write_text(plan.model_dump_json())
    assert "0.605 ± 0.002" in write_report(tmp_path).read_text()


def test_names_of_users_are_no_marks_of_the_report():
    name = "# <script>x</script> | *a* [b](javascript:c)\n\n- `d`"
    table = [["", name], [name, "+0.020"]]
    text = to_markdown([Section(name, [name], [(name, table)], [name], None)], [])
    shown = "\\# &lt;script&gt;x&lt;/script&gt; \\| \\*a\\* \\[b\\](javascript:c) - \\`d\\`"
    assert text.split("\n\n") == [
        "# The Power of Scale for Parameter-Efficient Prompt Tuning, reproduced",
        f"## {shown}", shown,
        f"**{shown}**", f"|  | {shown} |\n| --- | --- |\n| {shown} | +0.020 |", f"- {shown}\n",
    ]  # fmt: skip
    found = as_markdown([{"task": name, "value": 0.5}], "accuracy").splitlines()
    assert found[2] == f"| {shown} | 0.5000 |"
    assert (
        plain("train.max_eval_examples=600, builtin (~/a_b)")
        == "train.max_eval_examples=600, builtin (\\~/a_b)"
    )
    assert plain("1. x") == "1\\. x" and plain("_x_ 1.5") == "\\_x\\_ 1.5"


BOTH = {"builtin-small": "builtin-small", "builtin": "builtin"}


def cells_with(runs, scores):
    return {c.key: {"test": x} for c, x in zip(runs, scores, strict=True)}


@pytest.mark.parametrize(("above", "verdict"), [(0.1, "holds"), (0.3, "does not hold")])
def test_whether_prompts_come_closer_with_size(above, verdict):
    plan = make_plan("scale", StudyOptions(backbones=BOTH, tasks=["supersense"], seeds=2))
    found = {}
    for name, gap in (("builtin-small", 0.2), ("builtin", above)):
        found |= cells_with(plan.full("supersense", backbone=name), [0.9, 0.902])
        found |= cells_with(plan.prompts("supersense", backbone=name), [0.9 - gap, 0.902 - gap])
    (told,) = STUDIES["scale"].summary(plan, found)
    # each of four means has a variance of 1e-6
    assert f"size: {verdict} here (0.200 below with builtin-small, {above:.3f} with" in told
    assert "difference 0.002" in told
    found.popitem()
    assert "cannot be told" in STUDIES["scale"].summary(plan, found)[0]


def test_whether_longer_adaptation_is_better():
    plan = make_plan("adaptation", StudyOptions(backbones=BOTH, tasks=["supersense"],
                     seeds=2, adapted={"builtin-small": 600, "builtin": 150}))  # fmt: skip
    found = cells_with(plan.prompts("supersense", backbone="builtin-small"), [0.52, 0.54])
    found |= cells_with(plan.prompts("supersense", backbone="builtin"), [0.3, 0.32])
    (told,) = STUDIES["adaptation"].summary(plan, found)
    assert "600 steps against 150: holds here (+0.220, standard error 0.014)" in told


def test_what_a_vote_is_worth():
    backbones = {"builtin-small": "builtin-small"}
    plan = make_plan("ensemble", StudyOptions(backbones, tasks=["supersense"], seeds=2))
    run = plan.run("ensemble", "supersense", length=plan.length, seeds=[0, 1])
    record = {"vote": 0.63, "mean": 0.61, "best": 0.64}
    (told,) = STUDIES["ensemble"].summary(plan, {run.key: record})
    assert "holds here (+0.020); it is -0.010 from the best prompt" in told


def test_config_of_studies_is_a_config_of_runs():
    """Settings in recipes and levers are keys of a run."""
    for settings in (*RECIPES["paper"].values(), *RECIPES["miniature"].values()):
        for key in settings:
            part, _, name = key.partition(".")
            inner = RunConfig.model_fields[part].annotation
            assert name in inner.model_fields  # type: ignore[union-attr]


# ---- methods side by side


def test_methods_have_the_same_budget_and_the_users_settings_come_last():
    settings = read_overrides(["train.steps=60", "lora:lora.rank=2", "model.dtype=mixed"])
    plan = make_plan("methods", StudyOptions(backbones=BOTH, tasks=["spam"], settings=settings))
    every = {m: methods.settings_of(plan, "builtin", m) for m in methods.METHODS}
    assert {own["train.steps"] for own in every.values()} == {60}
    assert {own["train.batch_size"] for own in every.values()} == {16}
    assert {len(own["factors"]) for own in every.values()} == {3}
    assert {m for m, own in every.items() if "lora.rank" in own} == {"lora"}
    few = methods.settings_of(plan, "builtin", "lora", 4)
    assert few["train.steps"] == 20 and few["train.batch_size"] == 4 and few["rows"] == 4
    assert methods.costs_run(plan, "builtin", "spam").numerics["dtype"] == "mixed"
    with pytest.raises(UserError, match="no method"):
        read_overrides(["lorra:train.steps=3"])


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("lora", "learning_rate"),
        ("prompt+lora", "lora.learning_rate"),
        ("model-tuning", "learning_rate"),
        ("mam", "learning_rate"),
    ],
)
def test_the_rate_that_is_varied_can_vary_in_a_population(method, key):
    values = {"task": "spam", "output": "x", "method": method}
    found, usual = method_runs.swept_rate(parse(RunConfig, values))
    assert found == key
    if method != "model-tuning":
        grid = {"seed": [0, 1], key: [usual, 3 * usual]}
        whole = parse(RunConfig, {**values, "prompt": {"population": grid}})
        assert len(whole.members()) == 4


def test_few_rows_are_as_many_of_each_label_and_others_with_another_seed():
    rows = [{"text": str(i), "label": "yes" if i % 5 == 0 else "no"} for i in range(40)]
    first, again, other = (method_runs.draw_rows(TASK, rows, 8, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [row["label"] for row in first].count("yes") == 4
    assert len({row["text"] for row in first}) == 8
    # where a label has no more rows, the others go on
    assert len(method_runs.draw_rows(TASK, rows, 30, 0)) == 30
    with pytest.raises(UserError, match="has 40 training rows, and 41"):
        method_runs.draw_rows(TASK, rows, 41, 0)


def test_a_rate_is_chosen_by_its_mean_over_seeds():
    def members(*values):
        rows = zip([0, 1] * 3, (0.1, 0.1, 0.2, 0.2, 0.3, 0.3), values, strict=True)
        return [method_runs.Member(*row, "x", "y", {}) for row in rows]  # type: ignore[arg-type]

    assert method_runs.chosen_rate(members(0.5, 0.5, 0.9, 0.3, 0.2, 0.2)) == 0.2
    assert method_runs.chosen_rate(members(0.5, 0.5, 0.9, None, 0.2, 0.2)) == 0.1
    assert method_runs.chosen_rate(members(0.5, 0.5, 0.6, 0.4, 0.2, 0.2)) == 0.1  # the lower one
    with pytest.raises(UserError, match="No learning rate"):
        method_runs.chosen_rate(members(None, 0.5, None, 0.5, 0.2, None))
    # the best of a sweep says little at an edge: what lies beyond is tried
    assert method_runs.rates_beyond(members(0.1, 0.1, 0.5, 0.5, 0.9, 0.9)) == [0.9, 3.0]
    assert method_runs.rates_beyond(members(0.9, 0.9, 0.5, 0.5, None, None)) == [0.0333, 0.01]
    assert method_runs.rates_beyond(members(0.5, 0.5, 0.9, 0.9, 0.2, 0.2)) == []


def test_rates_are_tried_beyond_a_best_one_at_an_edge_until_it_lies_inside(
    mine, tmp_path, monkeypatch
):
    def population(config, plan, rates, suite):
        tried.append((Path(config.output).name, *rates.values()))
        return [
            method_runs.Member(seed, rate, -abs(rate - 0.02), tmp_path, tmp_path, {})  # type: ignore[arg-type]
            for (_, choices), seed in itertools.product(rates.items(), plan.seeds)
            for rate in choices
        ]

    tried: list[tuple[str, list[float]]] = []
    monkeypatch.setattr(method_runs, "_population", population)
    plan = make_plan("methods", StudyOptions(**{**mine, "methods": ["lora"], "rows": []}))
    run = methods.runs_of(plan, "tiny", "mine", "lora")[0]
    suite = Suite(tmp_path, plan.backbones, plan.tasks, measure=methods.measure_run)
    backbone = load_backbone(plan.backbones["tiny"])
    config = method_runs.method_config(run, suite, backbone, tmp_path / "lora")
    sweep = method_runs.Plan(method_runs.Sweep.of(run.settings), [0, 1], None)
    members = method_runs.train_members(config, sweep, suite)
    usual = [0.0004, 0.0012, 0.004]
    assert tried == [("lora", usual), ("lora-beyond1", [0.012, 0.04])]
    assert method_runs.chosen_rate(members) == 0.012 and len(members) == 10


def test_methods_take_turns_and_ratios_are_of_one_round(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(method_costs.time, "perf_counter", lambda: next(clock))
    work = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = method_costs.in_turns(work, rounds=2)
    assert "".join(order) == "abc" + "abc" + "bca"
    assert found == {name: [1, 1] for name in "abc"}
    assert method_costs.median_ratio([2, 9, 4], [1, 3, 4]) == (2, 1, 3)


def fake_records(plan, task):
    """Records as the runs of the study write them."""
    records = {}
    for number, method in enumerate(methods.chosen_methods(plan)):
        for rows in (None, *plan.rows):
            for run in methods.runs_of(plan, "builtin", task, method, rows):
                value = 0.5 + 0.1 * number + 0.01 * (run.seed or 0) - 0.2 * (rows is not None)
                records[run.key] = {
                    "test": value, "validation": 0.0, "rate": 0.001, "metric": "accuracy",
                    "trainable_parameters": 1000 * 10**number, "bytes": 4096 * 10**number,
                    "parameters": 10**6, "load_seconds": 0.012, "majority": 0.2,
                    "majority_test": 0.3, "text_loss": 2.5 + number, "untuned_text_loss": 2.25,
                }  # fmt: skip
    run = methods.costs_run(plan, "builtin", task)
    times = {m: [1.0 + n, 1.0 + n] for n, m in enumerate(methods.chosen_methods(plan))}
    frozen = {m: t for m, t in times.items() if m != "model-tuning"}
    records[run.key] = {
        "memory": {m: {"total": 2**20 * (n + 1)} for n, m in enumerate(times)},
        "step_seconds": times, "alone_seconds": {"bare": [1.0, 0.5], **frozen},
        "mixed_seconds": {"bare": [2.0, 2.0], **frozen, "several methods": [3.0, 4.0]},
        "members": 8,
        "mixed_methods": ["lora", "prompt-tuning"],
    }  # fmt: skip
    return records


def test_the_tables_of_introductions_have_what_was_measured():
    chosen = ["prompt-tuning", "lora", "model-tuning"]
    options = StudyOptions(
        backbones={"builtin": "builtin"}, tasks=["spam"], seeds=2, methods=chosen, rows=[16]
    )
    plan = make_plan("methods", options)
    tables = dict(method_tables.tables(plan, fake_records(plan, "spam")))
    scores = {line[0]: line[1:] for line in tables["spam, builtin"]}
    assert scores["lora"] == ["2", "0.605 ± 0.007", "10,000", "75%", "0.001"]
    few = {
        line[0]: line[1:] for line in tables["spam, builtin: accuracy by number of training rows"]
    }
    assert few["lora"] == ["0.405 ± 0.007", "0.605 ± 0.007"]
    costs = {line[0]: line[1:] for line in tables["spam, builtin: costs"]}
    assert costs["lora"] == [
        "10,000", "40.0 KiB", "2.0 MiB", "2.000", "0.67", "3.00 (2.00 to 4.00)", "1.00"
    ]  # fmt: skip
    # one model after the other: 8 answers of 1 and of 0.5 s against a batch of 2 s
    assert costs[FULL][-2:] == ["1.00", "3.00 (2.00 to 4.00)"]
    assert costs["in one batch: lora, prompt-tuning"][-1] == "1.75 (1.50 to 2.00)"
    said = {line[0]: line[1:] for line in tables["spam, builtin: what is said in introductions"]}
    assert said["prompt-tuning"] == [
        "1,000 (0.10%)", "stays as it is", "1.0 MiB", "4.0 KiB", "12 ms, or none in a mixed batch",
        "1.50 (1.00 to 2.00)", "+0.250", "0",
    ]  # fmt: skip
    assert said[FULL][1] == "is another one" and said[FULL][-2:] == ["+2.250", "cannot be off"]
    sentences = method_tables.summary(plan, fake_records(plan, "spam"))
    assert "spam, builtin: a prompt has the least storage: holds here." in sentences
    assert sentences[-1].endswith(
        "time of an answer: does not hold here; full fine-tuning has less."
    )


def test_methods_are_trained_measured_and_reported_and_a_killed_study_goes_on(
    mine, tmp_path, monkeypatch
):
    monkeypatch.setattr(methods, "FACTORS", {"miniature": (1.0,)})
    monkeypatch.setattr(methods, "ROUNDS", 1)
    monkeypatch.setattr(methods, "MEMBERS", 2)
    options = StudyOptions(**{**mine, "methods": ["lora"], "rows": [4]})

    def interrupt(text):
        if text.startswith("[3/5]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(make_plan("methods", options), tmp_path, interrupt)
    before = read_records(tmp_path)
    said = []
    page, failed = reproduce(make_plan("methods", options), tmp_path, said.append)
    assert failed == 0 and said[-1] == "5 runs: 3 measured now, 0 failed"
    records = read_records(tmp_path)
    assert before.items() <= records.items()
    seeds = [records["tiny", "mine", "lora", None, seed, "all"] for seed in (0, 1)]
    # both seeds are of one run, which trained them together
    assert len(list(tmp_path.glob("runs/tiny/mine/all-lora/population/*"))) == 2
    for record in seeds:
        assert record["trainable_parameters"] == 2304 and record["steps"] == 4
        assert record["bytes"] > 4 * 2304 and record["untuned_text_loss"] > 0
    assert len(list(tmp_path.glob("runs/tiny/mine/rows4-lora-seed*/prompt"))) == 2
    costs = records["tiny", "mine", "costs", None, None, None]
    assert costs["memory"]["lora"]["total"] > costs["weights_bytes"]
    assert set(costs["mixed_seconds"]) == {"bare", "lora"}
    told = json.loads((tmp_path / "report.json").read_text())
    assert "mine, tiny: what is said in introductions" in told[0]["tables"]
    assert (tmp_path / "figures/methods.png").is_file() and page.is_file()


def test_a_model_that_was_measured_is_removed_and_made_again_if_its_record_is_lost(mine, tmp_path):
    plan = make_plan("methods", StudyOptions(**{**mine, "methods": ["model-tuning"], "seeds": 1}))
    (run,) = methods.runs_of(plan, "tiny", "mine", "model-tuning", 4)
    suite = Suite(tmp_path, plan.backbones, plan.tasks, measure=methods.measure_run)
    run = run._replace(settings={**run.settings, "factors": [1.0], "train.steps": 1})
    assert run_suite([run], suite) == 0
    first = read_records(tmp_path)[run.key]
    assert not list(tmp_path.glob("runs/**/model"))
    (tmp_path / "cells.jsonl").unlink()
    assert run_suite([run], suite) == 0
    again = read_records(tmp_path)[run.key]
    sizes = lambda record: {k: v for k, v in record.items() if not k.endswith("seconds")}
    assert sizes(again) == sizes(first) and first["trainable_parameters"] == first["parameters"]


def test_what_a_backbone_does_not_allow_is_left_out_with_the_reason(mine, tmp_path):
    plan = make_plan("methods", StudyOptions(**{**mine, "methods": ["lora"], "rows": []}))
    (run, _) = methods.runs_of(plan, "tiny", "mine", "lora")
    run = run._replace(settings={**run.settings, "lora.rank": 17})
    suite = Suite(tmp_path, plan.backbones, plan.tasks, measure=methods.measure_run)
    assert run_suite([run], suite) == 0
    assert "lora.rank is 17" in read_records(tmp_path)[run.key]["skipped"]


def test_the_table_of_dept_has_the_means_of_the_paper_and_ours_beside_them():
    """Means: the columns of the published table; entries: methods.md has their sources."""
    plan = plan_of("dept", "paper").model_copy(
        update={"tasks": {}, "methods": ["lora"], "seeds": 2}
    )
    plan.tasks = {name: TASK.model_copy(update={"name": name}) for name in dept.TASKS}
    records = {}
    for task in dept.TASKS:
        for run in dept.runs_of(plan, task, "lora"):
            assert run.settings["train.steps"] == {"mnli": 250_000, "mrpc": 10_000}.get(
                task, run.settings["train.steps"]
            )
            records[run.key] = {
                "validation": 0.5 + 0.02 * (run.seed or 0),
                "trainable_parameters": 12345,
            }
    ((_, lines),) = dept.tables(plan, records)
    means = {line[0]: line[-2:] for line in lines}
    assert means["lora, here"] == ["51.0", "51.0"] and lines[1][1] == "12,345"
    published = {
        FULL: (84.9, 73.9), "houlsby": (84.5, 75.7), "bitfit": (83.3, 72.5), "lora": (85.3, 76.5),
        "prompt-tuning": (84.8, 60.0), "multitask-prompt-tuning": (85.6, 74.1),
        "SPoT": (82.3, 62.9), "ATTEMPT": (83.4, 70.5), "DePT": (85.9, 76.5),
    }  # fmt: skip
    for name, printed in published.items():  # the paper's means are rounded from other digits
        found = list(map(float, means[f"{name}, published"]))
        assert found == pytest.approx(printed, abs=0.11)
    variants = [v for v in STUDIES["dept"].variants(plan) if v.group == "BoolQ"]
    assert variants[0].paper == pytest.approx(0.813)


def test_a_cell_of_the_table_of_dept_runs_in_miniature(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(dept, "MINIATURE_STEPS", 2)
    plan = make_plan("dept", StudyOptions(**{**mine, "methods": ["prompt-tuning"], "seeds": 1}))
    settings = plan.settings | {"train.warmup_steps": 1}
    del settings["train.steps"]
    plan = plan.model_copy(update={"settings": settings})
    _, failed = reproduce(plan, tmp_path, quiet)
    (record,) = read_records(tmp_path).values()
    assert failed == 0 and record["steps"] == 2 and record["rate"] == 0.3
    assert "prompt-tuning, here" in (tmp_path / "report.md").read_text()
