"""K prompts in one run: where each starts, who goes on, and what came of them.

A lone prompt is a population of one. Each prompt is trained exactly as if it were alone: with the
batches of its own seed, the gradient of its own mean and an optimizer that sees nothing else.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import PrefixConfig
from jaxprompt.config.schema import PromptConfig, RunConfig, TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.batches import AnyArray, Example
from jaxprompt.data.tasks.registry import class_words
from jaxprompt.data.templates import start_words, with_counts
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import first_words
from jaxprompt.inference.engine import make_engine
from jaxprompt.inference.rank import features
from jaxprompt.methods import soft_verbalizer
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.base import Trainables, join_groups, member_groups, num_members
from jaxprompt.methods.hard_prompt import allowed_words, nearest
from jaxprompt.methods.init import Vocabulary, initial_prompt, lookup
from jaxprompt.methods.library import Similar, similar_prompts
from jaxprompt.methods.prefix import from_words
from jaxprompt.methods.registry import method_of
from jaxprompt.models.base import Model
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.injection import Layers, Params, without_dropout
from jaxprompt.runtime import processes
from jaxprompt.runtime.markdown import plain
from jaxprompt.training.progress import Progress
from jaxprompt.training.step import TrainState
from jaxprompt.training.trial import Structure, Trial, by_task, slot_order


def init_trainables(
    member: RunConfig,
    task: TaskConfig,
    backbone: Backbone,
    tokenizer: Tokenizer,
    examples: Sequence[Example] = (),
) -> Trainables:
    """The trainables [1, ...] that a prompt, or a whole model, starts from.

    Args:
        examples: of training, for starts that are made of them.
    """
    method, table = method_of(member), backbone.params["token_embedder"]["embedding"]
    start = np.zeros((0, backbone.config.d_model), np.float32)
    if method.uses_prompt:
        words = class_words(task)
        labels = tokenizer.encode_words(words, task.separator)
        for word, ids in zip(words, labels, strict=True):
            if not set(ids) - set(tokenizer.special_ids):
                raise UserError(
                    f"The class label {word!r} of task {task.name!r} has no token of this "
                    "backbone; use another word."
                )
        settings = {"length": method.num_start_vectors(member.prompt)}
        if member.prompt.init == "nearest":
            settings |= {"init": "file", "file": _nearest(member.prompt).prompt}
        start = initial_prompt(
            member.prompt.model_copy(update=settings),
            Vocabulary(
                table,
                encode=tokenizer.encode,
                special_ids=tokenizer.special_ids,
                pieces=min(tokenizer.size, backbone.config.vocab_size),
                labels=labels,
            ),
            seed=member.train.seed,
            from_file=lambda path: load_prompt(path).vectors,
        )
        start = _with_words_of_template(start, member, task, table, tokenizer)
        if member.searches:
            start = _on_words(start, member, task, table, tokenizer)
    trainables = method.init(backbone.params, start[None], member.prompt, member.train.seed)
    trainables = _with_start_of_prefix(trainables, member, backbone, tokenizer)
    if soft_verbalizer.NAME in member.parts:
        return _with_label_rows(trainables, member, task, backbone, tokenizer, examples)
    return trainables


def _with_label_rows(
    trainables: Trainables,
    member: RunConfig,
    task: TaskConfig,
    backbone: Backbone,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
) -> Trainables:
    """The trainables with the start of their label rows."""
    if member.soft_verbalizer.init == "words":
        rows = soft_verbalizer.rows_of_words(backbone.params, task, tokenizer)
        return soft_verbalizer.with_rows(trainables, rows)
    ids = tokenizer.encode_targets(first_words(task), task.separator)
    numbers = {tuple(each): number for number, each in enumerate(ids)}
    of_label: list[list[Example]] = [[] for _ in ids]
    for example in examples:
        rows_of_label = of_label[numbers[tuple(example.targets.tolist())]]
        if len(rows_of_label) < member.soft_verbalizer.rows:
            rows_of_label.append(example._replace(targets=np.zeros(0, np.int32)))
    for label, chosen in zip(task.labels or (), of_label, strict=True):
        if not chosen:
            raise UserError(
                f"soft_verbalizer.init is prototypes, and no training row has the label {label!r}; "
                "use init=words, or add such rows."
            )
    injection = method_of(member).inject(trainables, backbone.params)
    found = features(
        make_engine(backbone.params, without_dropout(injection), backbone.model, backbone.mesh),
        [example for chosen in of_label for example in chosen],
        masked=tokenizer.masked,
        batch_size=member.train.eval_batch_size,
    )
    labels = np.repeat(np.arange(len(ids)), [len(chosen) for chosen in of_label])
    rows = soft_verbalizer.rows_of_prototypes(found, labels, len(ids))
    return soft_verbalizer.with_rows(trainables, rows)


def _with_start_of_prefix(
    trainables: Trainables, member: RunConfig, backbone: Backbone, tokenizer: Tokenizer
) -> Trainables:
    """The trainables with the prefix of a text, where that is asked for."""
    if "prefix" not in member.parts or member.prefix.init != "text":
        return trainables
    words = _words_of_prefix(member.prefix, backbone, tokenizer)
    if len(member.parts) == 1:
        return from_words(trainables, words)
    return {**trainables, "prefix": from_words(trainables["prefix"], words)}


def _with_words_of_template(
    start: Float[np.ndarray, "P D"],
    member: RunConfig,
    task: TaskConfig,
    table: Float[Array, "V D"],
    tokenizer: Tokenizer,
) -> Float[np.ndarray, "P D"]:
    """The start with the embeddings of the words that the task's template has for some vectors."""
    counted = with_counts(task.template, tokenizer.encode)
    slots = start_words(counted, member.prompt.length)
    if slots and len(start) != member.prompt.length:
        raise UserError(
            f"The template of task {task.name!r} has words that vectors start from, and with "
            f"method={member.method} vectors are made of others; use prompt-tuning, or "
            "[prompt:n] without words."
        )
    for first, count, words in slots:
        ids = tokenizer.encode(words)[:count]
        start[first : first + len(ids)] = lookup(table, ids)
    return start


def _on_words(
    start: Float[np.ndarray, "P D"],
    member: RunConfig,
    task: TaskConfig,
    table: Float[Array, "V D"],
    tokenizer: Tokenizer,
) -> Float[np.ndarray, "P D"]:
    """The start with each vector at the nearest word that a search may use."""
    allowed = allowed_words(tokenizer, len(table), member.search.allowed, tuple(class_words(task)))
    return lookup(table, np.asarray(nearest(jnp.asarray(start), table, allowed)))


def _words_of_prefix(config: PrefixConfig, backbone: Backbone, tokenizer: Tokenizer) -> Layers:
    """The prefixes of the text that prefixes start from, cut to their length or repeated."""
    ids = tokenizer.encode(config.text or "")
    if not ids:
        raise UserError(f"prefix.text is {config.text!r}, which has no token; give some words.")
    filled = np.resize(np.asarray(ids, np.int32), config.length)
    return processes.fetch(_prefix_of_words(backbone.model, backbone.params, filled))


@functools.partial(jax.jit, static_argnums=0)
def _prefix_of_words(model: Model, params: Params, ids: Int[AnyArray, " P"]) -> Layers:
    return model.prefix_of_words(params, ids)


def _nearest(config: PromptConfig) -> Similar:
    """The prompt that ``init: nearest`` starts from."""
    return similar_prompts(config.file or "", config.library or "").similar[0]


def nearest_notes(members: Sequence[RunConfig]) -> list[str]:
    """A sentence for each start from the most similar prompt of a library."""
    configs = [m.prompt for m in members if m.prompt_length and m.prompt.init == "nearest"]
    notes = []
    for config in {(config.file, config.library): config for config in configs}.values():
        chosen = _nearest(config)
        notes.append(
            f"starts from {chosen.prompt}, the most similar to {config.file} (cosine "
            f"{chosen.cosine:.3f})"
        )
    return notes


def start_warnings(members: Sequence[RunConfig], tasks: Sequence[TaskConfig]) -> list[str]:
    """A sentence for each start from class labels that is not what its name says."""
    warnings = []
    for member, task in zip(members, tasks, strict=True):
        method, count = method_of(member), len(class_words(task))
        if not method.uses_prompt or member.prompt.init != "class_labels":
            continue
        rows = method.num_start_vectors(member.prompt)
        if not count:
            warnings.append(
                f"prompt.init is class_labels and task {task.name!r} has none, so that all vectors "
                "start from words drawn from the vocabulary; name some words in task.class_labels, "
                "or set prompt.init=sampled_vocabulary"
            )
        elif count > rows:
            warnings.append(
                f"task {task.name!r} has {count} class labels and the prompt {rows} vectors to "
                f"start from them; the last {count - rows} are left out"
            )
    return list(dict.fromkeys(warnings))


LONG_PROMPT = 500  # the paper's longest has 150 vectors


def length_warnings(length: int, examples: Sequence[Example]) -> list[str]:
    """A sentence where a prompt of this length is most of what the examples' rows hold."""
    if length <= LONG_PROMPT:
        return []
    text = sum(len(example.inputs) for example in examples) / max(len(examples), 1) - length
    return [
        f"prompt.length is {length}, and the text of a row has {text:.0f} tokens on average: a "
        f"step reads {1 + length / max(text, 1):,.0f} times as many positions as without a prompt; "
        "the paper's prompts have 1 to 150 vectors"
    ]


def stack_trainables(
    members: Sequence[Trainables], structures: Sequence[Structure] | None = None
) -> Trainables:
    """The trainables of members, [1, ...] each, as one: [K, ...] for each structure.

    Members of one structure must follow each other.

    Args:
        structures: of each member, see ``Trial.structure``; None: those of one shape have one.
    """
    shapes = lambda tree: str(jax.tree.map(jnp.shape, tree))
    keys = structures or [*map(shapes, members)]
    pairs = itertools.groupby(zip(keys, members, strict=True), lambda pair: pair[0])
    groups = [[member for _, member in group] for _, group in pairs]
    together = lambda *leaves: jnp.concatenate(leaves)
    # a single member may be a whole model, so it is not copied
    return join_groups([g[0] if len(g) == 1 else jax.tree.map(together, *g) for g in groups])


def keep_members(state: TrainState, slots: Sequence[int]) -> TrainState:
    """The state with the members in these slots only."""
    optimizers = member_groups(state.optimizer, like=state.trainables)
    kept, first = [], 0
    for both in zip(member_groups(state.trainables), optimizers, strict=True):
        last = first + num_members(both[0])
        chosen = jnp.asarray([slot - first for slot in slots if first <= slot < last])
        if chosen.size:
            take = lambda x, chosen=chosen: jnp.take(x, chosen, axis=0)
            kept.append(jax.tree.map(take, both))
        first = last
    trainables, optimizer = (join_groups(parts) for parts in zip(*kept, strict=True))
    return state._replace(trainables=trainables, optimizer=optimizer)


def better_half(trials: Sequence[Trial], progress: Progress) -> list[Trial]:
    """The better half of trials, rounded up, in their order.

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), by the best metric of each.
    In a tie the earlier ones go on.
    """
    ranked = sorted(trials, key=lambda t: (-progress.best[t.number], t.number))
    kept = {trial.number for trial in ranked[: max(1, math.ceil(len(trials) / 2))]}
    return [trial for trial in trials if trial.number in kept]


def better_tasks(tasks: Mapping[str, Sequence[Trial]], progress: Progress) -> list[Sequence[Trial]]:
    """The trials of the better half of the tasks, rounded up, and of two at least.

    By the mean of the best metrics of a task's trials. In a tie the earlier ones go on.
    """
    means = [statistics.fmean(progress.best[t.number] for t in each) for each in tasks.values()]
    ranked = sorted(range(len(means)), key=lambda number: (-means[number], number))
    kept = {*ranked[: max(2, math.ceil(len(means) / 2))]}
    return [trials for number, trials in enumerate(tasks.values()) if number in kept]


def survivors(trials: Sequence[Trial], progress: Progress, of: str = "prompts") -> tuple[int, ...]:
    """The numbers of the trials that go on, by slot.

    Args:
        of: what is halved, see ``TrainConfig.successive_halving_of``.
    """
    tasks = by_task(trials[number] for number in progress.active)
    if of == "tasks":
        halves = better_tasks(tasks, progress)
    else:
        halves = [better_half(members, progress) for members in tasks.values()]
    return tuple(trial.number for trial in slot_order(itertools.chain(*halves)))


def population_table(
    choices: Sequence[Values], trials: Sequence[Trial], progress: Progress
) -> list[Values]:
    """A row for each trial: what it differs in, its best metric, and the step when it stopped.

    The metric is None where a trial never had a finite one.
    """
    rows = []
    for choice, trial in zip(choices, trials, strict=True):
        names = {"task": trial.task.name} if "task" in choice else {}
        best = progress.best[trial.number]
        rows.append({
            **choice,
            **names,
            "value": best if math.isfinite(best) else None,
            "best_step": progress.best_step[trial.number],
            "steps": progress.trained[trial.number],
        })  # fmt: skip
    return rows


def as_markdown(rows: Sequence[Values], metric: str) -> str:
    """The table, best prompt first, of each task."""
    names = list(rows[0])
    head = [metric if name == "value" else name for name in names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(names) + "|"]
    lost = lambda value: "diverged" if value is None else f"{value:.4f}"
    worth = lambda value: -math.inf if value is None else value
    for row in sorted(rows, key=lambda row: (row.get("task", ""), -worth(row["value"]))):
        cells = (lost(v) if k == "value" else plain(f"{v}") for k, v in row.items())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
