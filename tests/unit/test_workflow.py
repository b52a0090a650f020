"""The workflow of continuous integration, as far as it can be read without running it."""

import yaml
from helpers import ROOT


def test_the_workflow_runs_the_checks_on_pythons_that_have_tested_versions():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["check"]
    pythons = job["strategy"]["matrix"]["python"]
    tested = {
        path.stem.removeprefix("constraints-") for path in ROOT.glob("scripts/constraints-*.txt")
    }
    assert pythons == sorted(tested)
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
