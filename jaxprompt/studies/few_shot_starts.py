"""Prompts to start from when a task has few rows: SPoT, PPT and Reptile.

Each is tuned once on other tasks, or on text without answers, and kept in the output.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.rows import Rows
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import to_text
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.runtime.files import write_atomically
from jaxprompt.studies.continual_parts import trained
from jaxprompt.studies.runs import PassWarnings, Run, Settings, Suite, run_config
from jaxprompt.training.loop import train

SPOT, PPT, REPTILE = "spot", "ppt", "reptile"
ROUNDS, OUTER_RATE = 10, 0.5  # of Reptile
PAIRS = {"train": 2000, "validation": 200}  # texts of PPT


def start_of(kind: str, run: Run, suite: Suite, tasks: Sequence[TaskConfig]) -> Path:
    """Where the prompt to start from lies; it is tuned unless it is there already.

    Args:
        kind: SPOT (Vu et al. 2022, arXiv 2110.07904: tuned on a mixture of the sources), PPT or
            REPTILE.
        run: of prompt tuning on all rows.
        tasks: the target first, then its sources; test rows of none are read.
    """
    folder = suite.out / "runs" / run.backbone / "few-shot-starts" / f"{kind}-P{run.length}"
    target, *sources = (task.model_copy(update={"test": None}) for task in tasks)
    if kind == REPTILE:
        return reptile(run, suite, sources, folder)
    if kind == PPT:
        pairs = halves_task(target, folder.with_name(f"{folder.name}-rows"))
        return trained(run, suite, pairs, folder).absolute()
    if len(sources) == 1:
        return trained(run, suite, sources[0], folder).absolute()
    parts: Values = {
        task.name: {k: v for k, v in task.model_dump().items() if k != "name"} for task in sources
    }
    inside = suite._replace(tasks={task.name: task for task in sources})
    return trained(run, inside, {"mixture": parts}, folder).absolute()


# ---- PPT


def halves(texts: Sequence[str], seed: int) -> Rows:
    """Pairs of halves of texts, every second of them with the second half of another text.

    Pre-trained prompt tuning has such a task of next sentences, which needs no answers (Gu et al.
    2022, arXiv 2109.04332, section 3.2). Texts of fewer than four words are left out.
    """
    words = [text.split() for text in texts]
    long = [each for each in words if len(each) >= 4]
    order = np.random.default_rng(seed).permutation(len(long))
    rows = []
    for place, number in enumerate(order):
        first, second = long[number], long[number if place % 2 == 0 else order[place - 1]]
        rows.append({
            "first": " ".join(first[: len(first) // 2]),
            "second": " ".join(second[len(second) // 2 :]),
            "label": "no" if place % 2 else "yes",
        })  # fmt: skip
    return rows


def halves_task(task: TaskConfig, folder: Path) -> TaskConfig:
    """The task to tell whether a half follows, of the task's texts without their answers."""
    values: Values = {"name": f"{task.name}-halves", "template": "{first} | {second}"}
    values |= {"labels": ["no", "yes"], "max_input_length": task.max_input_length}
    for split, count in PAIRS.items():
        file = (folder / f"{split}.jsonl").absolute()
        values[split] = str(file)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            texts = [to_text(task, row)[0] for row in load_rows(task, split, count)]
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in halves(texts, 0))
            write_atomically(file, "".join(lines))
    return parse(TaskConfig, values, "task.")


# ---- Reptile


def reptile_step(
    start: Float[np.ndarray, "P D"], tuned: Float[np.ndarray, "K P D"], rate: float
) -> Float[np.ndarray, "P D"]:
    """The start, moved by ``rate`` of the mean way to what K tasks have tuned it to.

    Reptile in batches (Nichol et al. 2018, arXiv 1803.02999, section 2).
    """
    return start + rate * (tuned - start).mean(axis=0)


def reptile(run: Run, suite: Suite, sources: Sequence[TaskConfig], folder: Path) -> Path:
    """A start from which each source is learnt in few steps: a file of vectors.

    The sources are the members of one population. Each round tunes all of them a tenth of the
    run's steps from the file of the last round, and writes the next file. The first round starts
    from sampled words, the same for all, and goes all the way to the mean.
    """
    names = [(folder / f"start-{number}.npy").absolute() for number in range(1, ROUNDS + 1)]
    for number, name in enumerate(names):
        if name.is_file():
            continue
        before = names[number - 1] if number else None
        tuned = _inner_loop(run, suite, sources, before, folder / f"round-{number}")
        start = np.load(before) if before else tuned.mean(axis=0)
        part = folder / "part.npy"
        np.save(part, reptile_step(start, tuned, OUTER_RATE))
        part.replace(name)
    return names[-1]


def _inner_loop(
    run: Run, suite: Suite, sources: Sequence[TaskConfig], start: Path | None, folder: Path
) -> Float[np.ndarray, "K P D"]:
    """What each source tunes the start to; the folder ends with the number of the round."""
    steps = max(1, run.settings["train.steps"] // ROUNDS)
    inner: Settings = {"train.steps": steps, "train.schedule": "constant"}
    inner |= {"train.evaluate_every": steps, "train.checkpoint_every": steps}
    inner |= {"prompt.init": "file", "prompt.file": str(start)} if start else {
        "prompt.init": "sampled_vocabulary"
    }  # fmt: skip
    # another seed in each round, so that it has other rows
    seed = int(folder.name.rpartition("-")[2])
    own = run._replace(method="prompt", seed=seed, settings=run.settings | inner)
    path = suite.backbones[run.backbone]
    values: Values = run_config(own, suite.recipe, sources[0], path, folder).model_dump()
    values["task"] = sources[0].name
    values["prompt"]["population"] = {"task": [task.model_dump() for task in sources]}
    train(parse(RunConfig, values), PassWarnings(suite.say))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    several = len(sources) > 1
    places = [
        folder / "population" / str(n) / "prompt" if several else folder / "prompt"
        for n in range(len(sources))
    ]
    return np.stack([np.asarray(load_prompt(place).vectors) for place in places])
