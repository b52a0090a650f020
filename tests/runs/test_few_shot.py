"""The study of few rows as a whole, on a tiny backbone."""

import json

from helpers import make_backbone, run_values

from jaxprompt.studies import few_shot_starts
from jaxprompt.studies.few_shot import HARD, MPT, REPTILE
from jaxprompt.studies.options import StudyOptions
from jaxprompt.studies.reproduce import make_plan, reproduce
from jaxprompt.studies.runs import read_records


def test_ways_with_few_rows_are_measured_from_starts_that_are_tuned_once(tmp_path, monkeypatch):
    monkeypatch.setattr(few_shot_starts, "ROUNDS", 2)
    values = run_values(make_backbone(tmp_path / "tiny"), tmp_path)
    files = [tmp_path / f"{name}.yaml" for name in ("target", "source", "other")]
    for file in files:
        task = values["task"] | {"name": file.stem, "test": values["task"]["validation"]}
        file.write_text(json.dumps(task))
    ways = [HARD, MPT, REPTILE]
    plan = make_plan("few-shot", StudyOptions(
        {"tiny": values["backbone"]}, list(map(str, files)), seeds=1, length=3, rows=[2],
        recipe="miniature", methods=ways,
        settings={"train.steps": 4, "train.batch_size": 4, "model.unroll": False},
    ))  # fmt: skip
    said = []
    _, failed = reproduce(plan, tmp_path / "out", said.append)
    records = read_records(tmp_path / "out")
    assert not failed and {key[2] for key in records} == {*ways}, said
    for record in records.values():
        assert 0 <= record["test"] <= 1 and 0 <= record["validation"] <= 1
    starts = tmp_path / "out/runs/tiny/few-shot-starts"
    assert (starts / "reptile-P3/start-2.npy").is_file() and (starts / "spot-P3/prompt").is_dir()
    report = (tmp_path / "out/report.md").read_text()
    assert "the best mean is that of" in report and "figures/few-shot.png" in report
