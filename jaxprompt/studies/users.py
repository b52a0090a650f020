"""The study of users: a prompt for each, beside one for all, for clusters, and another user's."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxprompt.api import open_session
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.users import UsersConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.batches import with_member
from jaxprompt.data.examples import tokenize
from jaxprompt.data.rows import Row
from jaxprompt.data.users import Histories, histories
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.inference.engine import make_engine
from jaxprompt.inference.predict import predict
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.user_library import open_library
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.injection import Injection
from jaxprompt.runtime.files import write_atomically
from jaxprompt.serving.features import text_features
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.runs import PassWarnings, Run, Settings, Suite, of_method
from jaxprompt.studies.study import Hypothesis, Records, StudyPlan, Table, Variant
from jaxprompt.studies.tables import NOTHING, mean_and_spread
from jaxprompt.studies.user_rows import LABELS, changelog_rows, some_users
from jaxprompt.studies.user_swaps import draw_swaps, per_user, swap_control, swap_matrix
from jaxprompt.training.loop import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

USERS, FEWEST, MOST, CLUSTERS = 24, 8, 60, 4
TASK = "stops"
SHARED, RANDOM, CLUSTER = "shared", "random-id", "cluster"
LOW, FULL = "own-low_rank", "own-full"  # with the freedom that users have
LABEL = {
    SHARED: "one shared prompt",
    RANDOM: "one prompt, a random id of the user in the text",
    CLUSTER: f"a prompt for each of {CLUSTERS} clusters",
    LOW: "a prompt for each user, low rank",
    FULL: "a prompt for each user, full",
}
WRONG = {LOW: "another user's prompt, low rank", FULL: "another user's prompt, full"}
BINS = ((0, 10), (10, 20), (20, 999))  # training rows: more than the first, at most the second
SHORT: Settings = {"train.steps": 90, "train.batch_size": 16, "users.shared_steps": 60}
LONG: Settings = {"train.steps": 1200, "train.batch_size": 32, "users.shared_steps": 1000}
RATE = 0.1  # of AdamW, after the shared prompt; the runs are short


def tasks() -> dict[str, TaskConfig]:
    """The one task of the study; its rows are found when it runs."""
    values = {"name": TASK, "template": "{text}", "labels": LABELS, "max_input_length": 32}
    return {TASK: parse(TaskConfig, values)}


def runs_of(plan: StudyPlan, method: str) -> list[Run]:
    """A run for each seed."""
    settings = SHORT if plan.recipe == "miniature" else LONG
    settings = settings | of_method(plan.settings, "prompt")
    first = next(iter(plan.backbones))
    seeds = range(plan.seeds)
    return [Run(first, TASK, method, plan.length, seed, None, settings) for seed in seeds]


def _field(name: str, record: Record) -> float | None:
    return record.get(name)


ACCURACY, HURT, HISTORY = "accuracy on later rows", "users hurt and helped", "gain by history"


def variants(plan: StudyPlan) -> list[Variant]:
    """Accuracy, shares of users who lose and win, and the gain by size of the history."""
    found = []
    for method, label in LABEL.items():
        found.append(Variant(label, ACCURACY, runs_of(plan, method), read=partial(_field, "test")))
        if method in WRONG:
            runs = runs_of(plan, method)
            read = partial(_field, "swapped")
            found.append(Variant(WRONG[method], ACCURACY, runs, read=read))
    for method in (RANDOM, CLUSTER, LOW, FULL):
        for name in ("hurt", "helped"):
            label, runs = f"{LABEL[method]}: {name}", runs_of(plan, method)
            read = partial(_field, name)
            found.append(Variant(label, HURT, runs, read=read, judged=False))
    for method in (CLUSTER, LOW, FULL):
        for number in range(len(BINS)):
            found.append(
                Variant(
                    f"{LABEL[method]}: {_bin(number)}", HISTORY, runs_of(plan, method),
                    x=f"rows_{number}", series=LABEL[method],
                    read=partial(_field, f"gain_{number}"), judged=False,
                )
            )  # fmt: skip
    return found


def _bin(number: int) -> str:
    above, most = BINS[number]
    return f"more than {above} training rows" if most == 999 else f"{above + 1} to {most}"


# ---- rows


class Bench(NamedTuple):
    """What all runs of a seed share.

    answer: ``(bank [K, P, D], texts)``: which test rows member k answers rightly for user k.
    """

    settings: UsersConfig
    file: Path
    found: Histories
    folder: Path
    shared: Path
    answer: Callable[..., Bool[np.ndarray, " n"]]


def _rows_file(suite: Suite) -> Path:
    file = (suite.out / "users" / "rows.jsonl").absolute()
    if not file.is_file():
        _write(file, some_users(changelog_rows(), USERS, FEWEST, MOST))
    return file


def _write(file: Path, rows: Sequence[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def bench(run: Run, suite: Suite, backbone: Backbone) -> Bench:
    """Rows, the shared prompt of a seed and how test rows are answered."""
    file = _rows_file(suite)
    settings = UsersConfig(column="user", time="when", test=0.2, min_rows=FEWEST)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = histories(rows, settings)
    folder = (suite.out / "runs" / run.backbone / "users" / f"seed{run.seed}").absolute()
    shared = _train(
        run, suite, folder / SHARED, _files(suite, found.splits, folder / "rows"),
        {"train.steps": run.settings["users.shared_steps"], "train.schedule": "linear"},
    )  # fmt: skip
    task, session = suite.tasks[TASK], open_session(None, backbone)
    test, owners = found.splits["test"], found.owners("user", "test")

    def answer(
        bank: Float[np.ndarray, "K P D"],
        texts: Sequence[str] | None = None,
    ) -> Bool[np.ndarray, " n"]:
        given = test if texts is None else [
            row | {"text": text} for row, text in zip(test, texts, strict=True)
        ]  # fmt: skip
        vocabulary, length = backbone.config.vocab_size, bank.shape[1]
        examples = tokenize(task, given, session.tokenizer, VirtualTokens(vocabulary, length))
        placed = [
            with_member(example, int(owner), vocabulary, length)
            for example, owner in zip(examples, owners, strict=True)
        ]
        engine = make_engine(
            backbone.params, Injection(jnp.asarray(bank)), backbone.model, backbone.mesh
        )
        answers = predict(engine, task, placed, session.tokenizer, batch_size=64, pack=True)
        wanted = [row["label"] for row in test]
        return np.array(answers.predictions) == np.array(wanted)

    return Bench(settings, file, found, folder, shared, answer)


def _files(suite: Suite, splits: Mapping[str, Sequence[Row]], folder: Path) -> Values:
    """The task with these rows in files."""
    values: Values = suite.tasks[TASK].model_dump()
    for name in ("train", "validation", "test"):
        values[name] = str(_write(folder / f"{name}.jsonl", splits[name]))
    return values


def _train(run: Run, suite: Suite, folder: Path, task: Values | str, settings: Settings) -> Path:
    """Train or resume, and return the folder of prompts."""
    config: Values = {
        "backbone": suite.backbones[run.backbone], "task": task, "output": str(folder),
        "prompt": {"length": run.length, "init": "sampled_vocabulary"},
    }  # fmt: skip
    every = max(1, int(settings.get("train.steps", run.settings["train.steps"])) // 2)
    base: Settings = {
        "train.seed": run.seed, "train.tensorboard": False, "train.keep": 1,
        "train.evaluate_every": every, "train.checkpoint_every": every,
    }  # fmt: skip
    usual = {k: v for k, v in run.settings.items() if not k.startswith("users.")}
    own = {k: v for k, v in run.settings.items() if k.startswith("users.")}
    chosen = base | usual | (own if any(k.startswith("users.") for k in settings) else {})
    for key, value in (chosen | settings).items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    train(parse(RunConfig, config), PassWarnings(suite.say))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if "users" in config:
        return folder / "users"
    return folder if "population" in config["prompt"] else folder / "prompt"


# ---- runs


def measure(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of one seed of one way to serve users."""
    made = bench(run, suite, backbone)
    count = len(made.found.users)
    copies = np.repeat(load_prompt(made.shared).vectors[None], count, axis=0)
    shared = made.answer(copies)
    how = {SHARED: _shared, RANDOM: _random_id, CLUSTER: _cluster, LOW: _own, FULL: _own}
    record, right = how[run.method](run, suite, backbone, made, shared)
    return {
        "validation": None, "test": float(right.mean()),
        "steps": run.settings["train.steps"], "users": count,
        "test_rows": len(right), "train_rows": len(made.found.splits["train"]),
        "habit": habit(made.found), **_by_user(made, right, shared), **record,
    }  # fmt: skip


def habit(found: Histories) -> float:
    """The accuracy of always giving the label that a user's training rows have most often."""
    labels: dict[str, list[str]] = {}
    for row in found.splits["train"]:
        labels.setdefault(str(row["user"]), []).append(str(row["label"]))
    usual = {user: max(LABELS, key=own.count) for user, own in labels.items()}
    test = found.splits["test"]
    return float(np.mean([usual[str(row["user"])] == row["label"] for row in test]))


def _by_user(made: Bench, right: Bool[np.ndarray, " n"], shared: Bool[np.ndarray, " n"]) -> Record:
    """What users win or lose beside the shared prompt, and how that goes with their rows."""
    owners, count = made.found.owners("user", "test"), len(made.found.users)
    gains = per_user(right, owners, count) - per_user(shared, owners, count)
    rows = np.bincount(made.found.owners("user", "train"), minlength=count)
    record: Record = {
        "gain": float(gains.mean()),
        "hurt": float((gains < 0).mean()),
        "helped": float((gains > 0).mean()),
    }
    for number, (above, most) in enumerate(BINS):
        inside = (rows > above) & (rows <= most)
        if inside.any():
            record |= {
                f"gain_{number}": float(gains[inside].mean()),
                f"rows_{number}": float(rows[inside].mean()),
                f"users_{number}": int(inside.sum()),
            }
    return record


Right = Bool[np.ndarray, " n"]


def _shared(run, suite, backbone, made: Bench, shared: Right) -> tuple[Record, Right]:
    return {}, shared


def _random_id(
    run: Run, suite: Suite, backbone: Backbone, made: Bench, shared: Right
) -> tuple[Record, Right]:
    """The shared prompt goes on, on rows that begin with a word of the user's own."""
    rng = np.random.default_rng(run.seed or 0)
    words = {u: "".join(rng.choice([*"bdfgklmnprstvz"], 5)) for u in made.found.users}
    marked = {
        name: [row | {"text": f"{words[row['user']]}: {row['text']}"} for row in rows]
        for name, rows in made.found.splits.items()
    }
    place = _train(
        run, suite, made.folder / RANDOM, _files(suite, marked, made.folder / "marked"),
        _from(made.shared),
    )  # fmt: skip
    bank = np.repeat(load_prompt(place).vectors[None], len(made.found.users), axis=0)
    return {}, made.answer(bank, [row["text"] for row in marked["test"]])


def _from(shared: Path) -> Settings:
    """Settings of a run that goes on from the shared prompt, as users' prompts do."""
    return {
        "prompt.init": "file", "prompt.file": str(shared), "train.optimizer": "adamw",
        "train.learning_rate": RATE, "train.weight_decay": 0.0, "train.schedule": "linear",
    }  # fmt: skip


def _cluster(
    run: Run, suite: Suite, backbone: Backbone, made: Bench, shared: Right
) -> tuple[Record, Right]:
    """A prompt for each cluster of users, by the mean of features of their rows with answers."""
    session, count = open_session(None, backbone), len(made.found.users)
    rows, owners = made.found.splits["train"], made.found.owners("user", "train")
    features = text_features(session, [f"{row['text']} {row['label']}" for row in rows])
    means = np.stack([per_user(column, owners, count) for column in features.T], axis=1)
    chosen = k_means(means, CLUSTERS, run.seed or 0)
    cluster_of = dict(zip(made.found.users, chosen.tolist(), strict=True))
    parts = []
    for number in range(CLUSTERS):
        own = {
            name: [row for row in some if cluster_of[row["user"]] == number]
            for name, some in made.found.splits.items()
        }
        values = _files(suite, own, made.folder / "clusters" / str(number))
        parts.append(values | {"name": f"cluster{number}"})
    size = run.settings["train.batch_size"] // CLUSTERS
    more: Settings = {"prompt.population": {"task": parts}, "train.batch_size": size}
    place = _train(run, suite, made.folder / CLUSTER, TASK, _from(made.shared) | more)
    bank = np.stack(
        [load_prompt(place / "tasks" / f"cluster{n}" / "prompt").vectors for n in chosen]
    )
    return {}, made.answer(bank)


def k_means(
    points: Float[np.ndarray, "n D"], count: int, seed: int, steps: int = 20
) -> Int[np.ndarray, " n"]:
    """The cluster of each point, by Lloyd's algorithm from points far apart; none is empty."""
    rng = np.random.default_rng(seed)
    points = (points - points.mean(axis=0)) / (points.std(axis=0) + 1e-6)
    centres = points[rng.integers(len(points))][None]
    while len(centres) < count:  # k-means++ (Arthur and Vassilvitskii 2007)
        nearest = ((points[:, None] - centres) ** 2).sum(axis=-1).min(axis=1)
        chosen = rng.choice(len(points), p=nearest / nearest.sum())
        centres = np.concatenate([centres, points[chosen][None]])
    labels = np.zeros(len(points), int)
    for _ in range(steps):
        distances = ((points[:, None] - centres) ** 2).sum(axis=-1)
        labels = distances.argmin(axis=1)
        for number in range(count):
            if not (labels == number).any():  # takes the point that is worst off
                labels[distances.min(axis=1).argmax()] = number
            centres[number] = points[labels == number].mean(axis=0)
    return labels


def _own(
    run: Run, suite: Suite, backbone: Backbone, made: Bench, shared: Right
) -> tuple[Record, Right]:
    """A prompt for each user."""
    users = made.settings.model_dump() | {
        "freedom": run.method.removeprefix("own-"),
        "shared": str(made.shared),
    }
    users.pop("shared_steps")
    settings: Settings = {f"users.{name}": value for name, value in users.items()}
    settings["train.learning_rate"] = RATE
    task = suite.tasks[TASK].model_dump() | {"train": str(made.file)}
    place = _train(run, suite, made.folder / run.method, task, settings)
    library = open_library(place)
    paths = [library.own_prompt(user) for user in made.found.users]
    bank = np.stack([load_prompt(path).vectors for path in paths])
    size = max(sum(file.stat().st_size for file in path.iterdir()) for path in paths)
    numbers = bank[0].size if run.method == FULL else made.settings.rank
    owners = made.found.owners("user", "test")
    matrix = swap_matrix(made.answer, bank, owners)
    rows = np.bincount(owners, minlength=len(bank))
    record = swap_control(matrix, rows) | {
        "bytes": size, "numbers": numbers, "swaps": matrix.tolist(),
        "train_rows_of": np.bincount(made.found.owners("user", "train")).tolist(),
    }  # fmt: skip
    return record, made.answer(bank)


# ---- the report

COLUMNS = {
    "accuracy": "test", "mean gain of a user": "gain", "users helped": "helped",
    "users hurt": "hurt", "with another user's prompt": "swapped", "own prompt better": "own_wins",
    "own prompt worse": "own_loses",
}  # fmt: skip


def tables(plan: StudyPlan, records: Records) -> list[tuple[str, Table]]:
    """A line for each way to serve users, over all seeds."""
    lines, history = [["", *COLUMNS]], [["", *map(_bin, range(len(BINS)))]]

    def cells(known: Sequence[Record], names: Sequence[str]) -> list[str]:
        some = [[record[n] for record in known if record.get(n) is not None] for n in names]
        return [mean_and_spread(values) if values else NOTHING for values in some]

    for method, label in LABEL.items():
        known = [records[run.key] for run in runs_of(plan, method) if run.key in records]
        lines.append([label, *cells(known, list(COLUMNS.values()))])
        if method != SHARED:
            names = [f"gain_{number}" for number in range(len(BINS))]
            history.append([label, *cells(known, names)])
    return [
        ("All seeds, test rows", lines),
        ("Mean gain of a user over the shared prompt, by his training rows", history),
    ]


def panels(plan: StudyPlan, records: Records) -> dict[str, "Callable[[Axes], None]"]:
    """The rows of each user with the prompt of each user, the mean over seeds."""
    found = {}
    for method in (LOW, FULL):
        known = [records[run.key] for run in runs_of(plan, method) if run.key in records]
        swaps = [np.asarray(record["swaps"]) for record in known if record.get("swaps")]
        if swaps:
            mean, rows = np.mean(swaps, axis=0), np.asarray(known[-1]["train_rows_of"])
            found[f"accuracy of rows of user i with the prompt of user j:\n{LABEL[method]}"] = (
                partial(draw_swaps, mean, rows)
            )
    return found


def summary(plan: StudyPlan, records: Records) -> list[str]:
    """What a user costs."""
    found = []
    for method in (LOW, FULL):
        known = [records[run.key] for run in runs_of(plan, method) if run.key in records]
        if known:
            found.append(
                f"{LABEL[method]}: {known[0]['numbers']:,} numbers of his own "
                f"({4 * known[0]['numbers']:,} bytes), in an ordinary artefact with metadata and "
                f"model card of {max(r['bytes'] for r in known) / 1024:.0f} KiB."
            )
    every = [record for record in records.values() if record.get("habit") is not None]
    if every:
        one = every[0]
        found.append(
            f"{one['users']} users with {one['train_rows']:,} training rows and "
            f"{one['test_rows']:,} test rows. Always giving the label that a user gave most in his "
            f"training rows is right in {one['habit']:.3f} of the test rows."
        )
    return found


def notes(plan: StudyPlan) -> list[str]:
    """How the figures are to be read."""
    return [
        "Users are authors of entries in the changelogs of this machine's Debian packages; other "
        "machines have others. The question is whether the author ends the first point of an "
        "entry with a full stop, which the text does not show. Of each user the earliest 60% of "
        f"the rows train, the latest 20% are the test; at most {MOST} rows, at least "
        f"{FEWEST}. All ways start from the shared prompt of the seed, and have the same steps "
        "and rows a step. Swap control: each user has the prompts of three others. No text and no "
        "name of an author is in this report.",
    ]


HYPOTHESES = (
    Hypothesis(LABEL[LOW], ">", LABEL[SHARED], "users' prompts (low rank) beat a shared one"),
    Hypothesis(LABEL[FULL], ">", LABEL[SHARED], "users' prompts (full) beat a shared one"),
    Hypothesis(LABEL[LOW], ">", WRONG[LOW], "a user's own prompt (low rank) beats another user's"),
    Hypothesis(LABEL[FULL], ">", WRONG[FULL], "a user's own prompt (full) beats another user's"),
    Hypothesis(LABEL[LOW], ">", LABEL[CLUSTER], "users' prompts (low rank) beat cluster prompts"),
    Hypothesis(LABEL[LOW], ">", LABEL[RANDOM], "users' prompts (low rank) beat a random id"),
)
