"""Findings that compare more than two lines of a table."""

import statistics
from collections.abc import Sequence

from jaxprompt.evaluation.metrics import SUPERGLUE, superglue_score
from jaxprompt.studies.runs import Run
from jaxprompt.studies.study import Hypothesis, Records, StudyPlan, score, seeds_text


def _scores(runs: Sequence[Run], records: Records) -> list[float]:
    values = [score(records[run.key]) for run in runs if run.key in records]
    return [value for value in values if value is not None]


def superglue_average(plan: StudyPlan, records: Records) -> list[str]:
    """The benchmark's score, seed by seed, where all tasks are there."""
    scores = []
    for seed in range(plan.seeds):
        runs = {task: plan.prompts(task)[seed] for task in SUPERGLUE if task in plan.tasks}
        figures = {
            t: records[c.key].get("metrics", {}) for t, c in runs.items() if c.key in records
        }
        if len(figures) == len(SUPERGLUE):
            scores.append(superglue_score(figures))
    if not scores:
        return []
    mean = statistics.mean(scores)
    return [
        f"SuperGLUE score: {mean:.3f} over {seeds_text(len(scores))} ({min(scores):.3f} to "
        f"{max(scores):.3f}); the paper's T5-XXL 0.905 ({mean - 0.905:+.3f})"
    ]


def closer_with_size(plan: StudyPlan, records: Records) -> list[str]:
    """Whether the gap to full fine-tuning is smaller for the last backbone than for the first."""
    sentences, names = [], list(plan.backbones)
    for task in (t for t in plan.tasks if t != "multitask" and len(names) > 1):
        gaps, error = [], 0.0
        for name in (names[0], names[-1]):
            sides = [_scores(of(task, backbone=name), records) for of in (plan.full, plan.prompts)]
            if min(map(len, sides)) < 2:
                break
            gaps.append(statistics.mean(sides[0]) - statistics.mean(sides[1]))
            error += sum(statistics.variance(side) / len(side) for side in sides)
        if len(gaps) < 2:
            sentences.append(
                f"{task}: prompts come closer with size: cannot be told from one seed."
            )
            continue
        closer = gaps[0] - gaps[1]
        holds = "holds" if closer > 2 * error**0.5 else "does not hold"
        sentences.append(
            f"{task}: prompts come closer to full fine-tuning with size: {holds} here "
            f"({gaps[0]:.3f} below with {names[0]}, {gaps[1]:.3f} with {names[-1]}; standard error "
            f"of the difference {error**0.5:.3f})."
        )
    return sentences


def longer_adaptation(plan: StudyPlan, records: Records) -> list[str]:
    """The longest adaptation against the shortest."""
    names = sorted(plan.adapted, key=lambda name: plan.adapted[name])
    sentences = []
    for task in plan.tasks if len(names) > 1 else ():
        first, last = (
            _scores(plan.prompts(task, backbone=n), records) for n in (names[0], names[-1])
        )
        steps = f"{plan.adapted[names[-1]]:,} steps against {plan.adapted[names[0]]:,}"
        verdict = Hypothesis("", ">", "", "").verdict(last, first)
        sentences.append(f"{task}: longer adaptation is better, {steps}: {verdict}.")
    return sentences


def joint_answers(plan: StudyPlan, records: Records) -> list[str]:
    """The vote of several prompts beside their mean and the best of them."""
    sentences = []
    for task in plan.tasks:
        seeds = [run.seed for run in plan.prompts(task)]
        record = records.get(plan.run("ensemble", task, length=plan.length, seeds=seeds).key)
        if record and record.get("vote") is not None:
            above = record["vote"] - record["mean"], record["vote"] - record["best"]
            holds = "holds" if above[0] > 0 else "does not hold"
            sentences.append(
                f"{task}: the vote beats the mean: {holds} here ({above[0]:+.3f}); it is "
                f"{above[1]:+.3f} from the best prompt (one ensemble, so without a standard error)."
            )
    return sentences
