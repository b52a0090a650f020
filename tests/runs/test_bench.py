"""The benchmark against PEFT: what of it needs neither torch nor an idle machine."""

import importlib
import io
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS, make_backbone, run_values
from jax.extend.core import jaxprs_in_params

from jaxprompt.config.schema import MeshConfig
from jaxprompt.data.layout import BatchLayout
from jaxprompt.data.microbatches import length_sorted_microbatches
from jaxprompt.models.injection import Injection
from jaxprompt.models.t5 import t5
from jaxprompt.training import step


@pytest.fixture
def script(monkeypatch):
    for folder in ("bench", "bench/peft"):
        monkeypatch.syspath_prepend(str(SCRIPTS / folder))
    return importlib.import_module


@pytest.fixture
def tools(script):
    return script("bench_tools")


def test_rows_are_as_long_as_those_of_boolq_and_repeat_with_the_seed(tools):
    rows = tools.draw_rows(np.random.default_rng(0), 4000, longest=412)
    lengths = np.array([len(row["inputs"]) for row in rows])
    assert abs(lengths.mean() - 155.4) < 5 and lengths.min() == 37 and lengths.max() == 412
    assert all(row["inputs"][-1] == 1 and min(row["inputs"][:-1]) > 2 for row in rows)
    assert {len(row["targets"]) for row in rows} == {2, 3}
    assert abs(np.mean([len(row["targets"]) == 2 for row in rows]) - 0.62) < 0.05
    assert rows == tools.draw_rows(np.random.default_rng(0), 4000, longest=412)


def test_micro_batches_hold_each_row_once_sorted():
    rng = np.random.default_rng(1)
    for size in (1, 4, 32):
        lengths = rng.integers(100, 500, 32).tolist()
        found = length_sorted_microbatches(lengths, size)
        order = [row for rows in found for row in rows]
        assert sorted(order) == list(range(32))
        assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
        assert {len(rows) for rows in found} == {size}


def test_padding_and_its_useful_share(tools):
    rows = [{"inputs": [7, 8, 1]}, {"inputs": [1]}]
    assert tools.padded([row["inputs"] for row in rows], 0).tolist() == [[7, 8, 1], [1, 0, 0]]
    assert tools.useful_share(rows, [[2, 5]], prompt=2) == 0.8
    assert tools.useful_share(rows, [[1, 5], [1, 3]], prompt=2) == 1.0


def test_ratios_are_taken_round_by_round(tools):
    found = tools.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [2.0, 3.0, 1.0]}
    with pytest.raises(ValueError):
        tools.ratios([1.0], [1.0, 2.0])


def test_what_others_compute_is_what_is_neither_idle_nor_ours(tools):
    #                user nice system idle iowait irq softirq steal guest guest_nice
    machine = "cpu  {} 10 50 9000 70 3 2 5 40 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    process = "12 (a b) c) S 1 1 1 0 -1 0 0 0 0 0 {} 20 7 7 20 0 3 0 100 1 1"
    busy = [tools.busy_seconds(machine.format(user), 100) for user in (130, 430)]
    own = [tools.own_seconds(process.format(user), 100) for user in (80, 180)]
    assert busy == [2.0, 5.0] and own == [1.0, 2.0]
    before, after = (tools.Moment(*values) for values in zip((10.0, 12.0), busy, own, strict=True))
    assert before.others(after) == 1.0  # 3 seconds of two cores in 2, of which 1 was ours
    assert before.others(after._replace(own=9.0)) == 0.0  # ticks are coarse


def test_the_gate_waits_for_others_but_not_for_ever(tools, monkeypatch):
    gate = tools.Gate([], threshold=0.5, limit=10)
    clock, load = [0.0], [2.0, 1.0, 0.4, 0.0]

    def sleep(seconds):
        clock[0] += seconds

    def now():
        second = int(clock[0])
        return tools.Moment(clock[0], sum(load[:second]) + 2.0 * max(second - len(load), 0), 0.0)

    monkeypatch.setattr(tools.time, "sleep", sleep)
    monkeypatch.setattr(tools.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gate, "now", now)
    assert gate.wait() == pytest.approx(0.4) and clock[0] == 3.0
    clock[0] = 4.0
    assert gate.wait() == 2.0 and clock[0] == 14.0


def test_a_worker_answers_line_by_line_whatever_libraries_print(tools, tmp_path):
    (tmp_path / "worker.py").write_text(
        "import bench_tools\n"
        "class Echo:\n"
        "    def facts(self):\n"
        "        return {'name': 'echo'}\n"
        "    def double(self, value):\n"
        "        print('noise')\n"
        "        return {'value': 2 * value}\n"
        "bench_tools.serve(Echo)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS / "bench" / "peft")}
    lines = "".join(json.dumps({"do": "double", "value": n}) + "\n" for n in (3, 4))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "worker.py")],
        input=lines, capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    facts, *answers = map(json.loads, io.StringIO(done.stdout))
    assert facts["name"] == "echo" and facts["bare"] > 0
    assert [answer["value"] for answer in answers] == [6, 8]
    assert done.stderr.count("noise") == 2


def test_a_missing_interpreter_is_one_sentence(script, monkeypatch, tmp_path, capsys):
    bench = script("bench_peft")
    arguments = ["bench_peft.py", "--out", str(tmp_path), "--python", "no-such-python"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --python 'no-such-python' is no program")


def test_sides_that_compute_something_else_are_not_timed(script):
    bench = script("bench_peft")
    job = lambda name, dtype: {"name": name, "kind": "train", "dropout": 0.0, "batch_size": 8,
                               "dtype": dtype}  # fmt: skip
    jobs = [job("a", "float32"), job("b", "float32"), job("c", "mixed")]
    bench.check_losses(jobs, {"a": {"losses": [10.0]}, "b": {"losses": [10.0005]},
                              "c": {"losses": [10.3]}})  # fmt: skip
    for other, rough in ((10.002, 10.3), (10.0, 10.6), (10.0, float("nan"))):
        with pytest.raises(bench.UserError, match="do not compute the same"):
            bench.check_losses(jobs, {"a": {"losses": [10.0]}, "b": {"losses": [other]},
                                      "c": {"losses": [rough]}})  # fmt: skip


def test_each_job_of_ours_is_compared_with_what_does_the_same_work(script, tmp_path):
    bench, report = script("bench_peft"), script("bench_report")
    parser_defaults = {"size": "small", "prompt": 100, "batches": 2, "rounds": 2, "seed": 0,
                       "questions": 4, "batch_size": [8], "only": "", "huge_pages": ["ours"],
                       "stages": ["train", "answer"], "idle": 0.05, "gpu": False,
                       "method": "prompt"}  # fmt: skip
    options = bench.argparse.Namespace(**parser_defaults)
    jobs = bench.make_jobs(options)
    assert len({job["name"] for job in jobs}) == len(jobs)
    once = {"seconds": [1.0, 2.0], "user": 3.0, "system": 1.0, "others": 0.1}
    rounds = {job["name"]: [once, once] for job in jobs}
    warm = {"seconds": [5.0], "losses": [1.0], "shapes": [[[8, 384]], [[8, 256]]], "useful": 0.5}
    pairs = bench.compare(jobs, rounds)
    of = lambda name: {pair["peft"] for pair in pairs if pair["ours"] == name}
    assert of("ours float32 dropout B8") == {
        "PEFT float32 dropout B8", "PEFT float32 dropout micro B8",
    }  # fmt: skip
    assert len(of("ours mixed B8")) == 6 and len(of("ours mixed answers")) == 4
    machine = {"processor": "P", "cores": 2, "flags": ["avx2"], "environment": {"OMP_X": "1"}}
    result = {
        "settings": parser_defaults, "machine": machine, "jobs": jobs, "rounds": rounds,
        "workers": {"PEFT": {"versions": {"peft": "1"}, "threads": 2},
                    "ours": {"versions": {"jax": "2"}}},
        "warm_up": {job["name"]: warm for job in jobs}, "ratios": pairs,
        "typical": {"8": bench.typical(options, 8, batches=20)},
        "memory": [{"job": "ours mixed B8", "peak": 3 << 20, "bare": 1 << 20, "beyond": 2 << 20}],
    }  # fmt: skip
    measured = 2 * len(jobs)
    text = report.tables(json.loads(json.dumps(result)))
    assert "1.500 (1.500 to 1.500)" in text and "8x384, 256" in text and "OMP_X=1" in text
    assert f"0.05 cores during {measured} of {measured} measurements" in text
    assert "| ours mixed B8 | PEFT float32 B8 | 1.00 (1.00 to 1.00) |" in text
    assert "| ours mixed B8 | 3 | 1 | 2 |" in text
    report.draw(result, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


def test_a_population_is_compared_with_lone_runs_and_a_mixed_batch_with_separate_ones(script):
    bench = script("bench_peft")
    options = bench.argparse.Namespace(
        method="lora", gpu=False, only="", stages=["train", "answer"], batch_size=[32]
    )
    jobs = bench.make_jobs(options)
    assert len({job["name"] for job in jobs}) == len(jobs)
    seconds = lambda job: 4.0 if job["members"] > 1 and not job["apart"] else 2.0
    rounds = {job["name"]: [{"seconds": [seconds(job)]}] for job in jobs}
    pairs = {(p["ours"], p["peft"]): p["median"] for p in bench.compare(jobs, rounds)}
    assert pairs["ours float32 B32", "PEFT float32 B32"] == 1.0
    # 8 lone runs of 2 s against one run of 4 s
    assert pairs["ours 8 float32 B32", "8 x ours float32 B32"] == 4.0
    assert pairs["ours 8 float32 B32", "8 x PEFT float32 B32"] == 4.0
    assert pairs["ours 8 mixed float32 answers", "ours 8 apart float32 answers"] == 0.5
    assert pairs["ours 8 mixed float32 answers", "PEFT 8 mixed float32 answers"] == 1.0
    assert ("ours 8 mixed B32", "8 x ours float32 B32") not in pairs  # another precision


def test_members_apart_answer_the_same_questions_as_in_mixed_batches(script):
    ours = script("bench_ours")
    job = {"batch_size": 4, "members": 2}
    parts = ours.Ours._parts(None, job, [*"abcdef"])
    assert parts == [(0, ["a", "c"]), (1, ["b", "d"]), (0, ["e"]), (1, ["f"])]


def test_our_step_gets_micro_batches(script):
    ours = script("bench_ours")
    rows = [np.full(n, 9, np.int32) for n in (3, 40, 5, 20)]
    examples = [ours.Example(row, np.array([7, 1], np.int32)) for row in rows]
    step = lambda state, params, given: (given, params)
    mesh = ours.parallel.make_mesh(MeshConfig(data=2), ours.jax.devices()[:2])
    take = lambda widths: ours.take_step(step, None, None, examples, 2, widths, mesh)
    given, _, shapes = take(BatchLayout())
    assert [batch.inputs.shape for batch in given] == shapes == [(2, 64), (2, 32)]
    assert (given[1].inputs > 0).sum(axis=1).tolist() == [5, 3]
    assert take(BatchLayout(examples_per_row=2, packed_widths=(64,)))[2] == [(2, 64), (2, 64)]


# ---- time to accuracy


def events(*accuracies):
    return [
        {"step": 5 * n, "accuracy": accuracy, "seconds": 10.0 * n, "evaluating": 4.0 * n}
        for n, accuracy in enumerate(accuracies, 1)
    ]


def test_the_target_is_what_the_best_rate_first_had(script, tmp_path):
    bench = script("bench_time_to_accuracy")
    runs = {"0.1": events(0.2, 0.5, 0.5), "0.3": events(0.3, 0.4, 0.5), "1": events(0.1, 0.1, 0.1)}
    rate, target = bench.best(runs)
    assert rate == "0.1" and target["step"] == 10
    here = events(0.5, 0.4, 0.6)
    assert bench.reached(here, 0.5)["step"] == 5 and bench.reached(here, 0.55)["step"] == 15
    assert bench.reached(here, 0.7) is None
    record = {"seed": 0, "rate": rate, "target": target,
              "ours": {"float32": bench.reached(here, 0.5), "mixed": here[2]},
              "best_of_ours": {"float32": 0.6, "mixed": 0.6}, "others": {"mixed": 0.1},
              "events": {"ours": {"float32": here, "mixed": here}, "PEFT": runs}}  # fmt: skip
    never = {"float32": None}
    text = bench.table([record, record | {"seed": 1, "ours": never}])
    assert "| 0 | float32 | 0.1 | 0.500 | 20 | 10 | 2.00 | 2.00 | 10 | 5 | 0.600 | 0.10 |" in text
    assert "| 0 | mixed | 0.1 | 0.500 | 20 | 30 | 0.67 | 0.67 | 10 | 15 |" in text
    assert "| 1 | float32 | 0.1 | 0.500 | 20 | never |" in text
    assert "Ratio with evaluations, float32: 2.00 (2.00 to 2.00), 1 of 2 seeds" in text
    assert "Ratio with evaluations, mixed: 0.67" in text
    assert "Ratio" not in bench.table([record | {"ours": never}])
    bench.draw([record], tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 5_000


def test_evaluations_of_a_run_are_timed_one_by_one(script, monkeypatch, tmp_path):
    bench = script("bench_time_to_accuracy")
    name = "predict_per_member"
    monkeypatch.setattr(bench.evaluator, name, bench.evaluator.predict_per_member)
    values = run_values(make_backbone(tmp_path / "backbone"), tmp_path)
    values["train"] |= {"steps": 5}
    found = bench.ours(values)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    logged = [json.loads(line) for line in log.splitlines()]
    scores = {row["step"]: row["validation/accuracy"] for row in logged
              if "validation/accuracy" in row}  # fmt: skip
    assert {event["step"]: event["accuracy"] for event in found} == scores
    assert list(scores) == [2, 4, 5]
    times = [event["seconds"] for event in found]
    assert times == sorted(times) and all(bench.without(event) > 0 for event in found)


def products(jaxpr):
    """Floating-point operations of all matrix products of a program, norms not among them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), (of_batch, _)) = equation.params["dimension_numbers"]
            left, right = (x.aval.shape for x in equation.invars)
            depth = math.prod(left[axis] for axis in contracted)
            if not contracted or len(left) == len(right) == len(contracted) + len(of_batch):
                continue  # rows are scaled or added up
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


@pytest.mark.parametrize("gated", [True, False])
def test_the_operations_of_a_step_are_those_of_its_products(script, tiny, gated):
    bench = script("bench_step")
    activation = "gelu" if gated else "relu"
    model = tiny[0].with_config(gated=gated, activation=activation, head_dim=16)
    config = model.config
    point = bench.Point("tiny", text=24, rows=3, vectors=8, prompts=2)
    params = t5.abstract_params(config)
    width = point.text + point.vectors
    batch = bench.random_batch(
        config.vocab_size + 200, width, bench.TARGETS, point.vectors, rows=3, prompts=2
    )

    def loss(bank, params):
        return step.batch_losses(params, Injection(bank), model, batch, num_members=2)[0]

    bank = jnp.zeros((2, point.vectors, config.d_model))
    program = jax.make_jaxpr(jax.grad(loss))(bank, params)
    assert sum(bench.flops(config, point).values()) == products(program.jaxpr)


def test_steps_are_measured_in_turns_and_drawn(script, tmp_path, capsys, monkeypatch):
    bench = script("bench_step")
    monkeypatch.setattr(bench, "SWEEPS", {"rows": (1, 2), "model": ("builtin-small",)})
    monkeypatch.setattr(bench.Point.__new__, "__defaults__", ("builtin-small", 24, 1, 8, 1))
    command = ["bench_step.py", "--out", str(tmp_path), "--rounds", "2", "--dtype", "float32",
               "--vary", "rows", "model"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    points = json.loads((tmp_path / "step.json").read_text())["points"]
    assert [(p["varied"], p["point"]["rows"]) for p in points] == [
        (["rows", "model"], 1),
        (["rows"], 2),
    ]
    assert all(len(p["seconds"]) == len(p["peak"]) == 2 and p["temporary"] > 0 for p in points)
    assert points[1]["flops"]["head"] == 2 * points[0]["flops"]["head"]
    assert capsys.readouterr().out.count("| float32 |") == 3
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_a_population_is_timed_against_lone_runs(script, tmp_path, capsys, monkeypatch):
    bench = script("bench_population")
    backbone = make_backbone(tmp_path / "backbone")
    task = run_values(backbone, tmp_path)["task"]
    monkeypatch.setattr(bench, "run_values", lambda *args, make=bench.run_values: (
        make(*args) | {"task": task, "backbone": str(backbone)}
    ))  # fmt: skip
    command = ["bench_population.py", "--out", str(tmp_path / "out"), "--rounds", "1", "--prompts",
               "2", "--prompt", "3", "--steps", "2", "--wait", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    kept = json.loads((tmp_path / "out" / "population.json").read_text())
    [found] = kept["rounds"]
    assert len(found["together"]) == 1 and len(found["alone"]) == 2
    assert all(0 <= x < 1e-4 for x in kept["apart"])  # another prompt is 0.1 apart
    ratio = sum(found["alone"]) / found["together"][0]
    assert f"| 2 | 4 | 2 | float32 | {found['together'][0]:.1f} (" in (
        out := capsys.readouterr().out
    )
    assert f"| {ratio:.2f} ({ratio:.2f} to {ratio:.2f}) |" in out
