"""A run from top to bottom: backbone, data, prompt, steps, evaluations, checkpoints, result."""

import contextlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprompt import parallel
from jaxprompt.config import RunConfig, UserError
from jaxprompt.data.pipeline import Example, training_batches, with_prompt
from jaxprompt.data.tasks import Reference, load_rows, references, resolve_task, tokenize
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.evaluate.analyze import draw_curves
from jaxprompt.evaluate.metrics import majority
from jaxprompt.evaluate.score import Model, answer_each, check_metrics
from jaxprompt.evaluate.score import measure as measure_answers
from jaxprompt.model import family, small_weights
from jaxprompt.model.load import load_backbone
from jaxprompt.prompts.artefact import load_prompt
from jaxprompt.prompts.init import initial_prompt
from jaxprompt.prompts.methods import METHODS
from jaxprompt.train.checkpoint import Checkpoints
from jaxprompt.train.interrupt import Interrupted, Signals
from jaxprompt.train.logbook import (
    LOG_EVERY,
    Clock,
    Diverged,
    Logbook,
    Silent,
    check_loss,
    complete,
    open_run,
    write_atomically,
)
from jaxprompt.train.optimizer import per_prompt
from jaxprompt.train.population import as_markdown, better_half, keep_of, room_for, stacked, table
from jaxprompt.train.results import facts_of, save_tuned
from jaxprompt.train.step import TrainState, make_train_step, sound

MOST_ROLLBACKS = 10  # the rate is then a thousandth


class Split(NamedTuple):
    """Tokenized rows and the answers to compare predictions with."""

    examples: Sequence[Example]
    references: list[Reference]


def train(
    config: RunConfig, reporter: Any = None, signals: Signals | None = None
) -> dict[str, Any]:
    """Run or resume ``config`` in its output directory and return what ``result.json`` holds.

    Killed at any moment and called again, it ends with a bit-identical prompt: batch k is a pure
    function of seed and k, and so is all randomness. ``signals``: raises Interrupted, after the
    state was saved, where one of them came.
    """
    with contextlib.ExitStack() as open_files:  # closed also where the run is interrupted
        signals = signals or Signals(install=False)
        return _train(config, reporter or Silent(), signals, open_files)


def _train(
    config: RunConfig, reporter: Any, signals: Signals, open_files: contextlib.ExitStack
) -> dict[str, Any]:
    method, settings = METHODS[config.method], config.train
    parallel.check_same("config", config.model_dump(exclude={"output"}))
    task = resolve_task(config.task)
    check_metrics(task)
    folder = Path(config.output)
    result = parallel.by_first(lambda: complete(config))
    if result and (result.get("steps", 0) >= settings.steps or result.get("stopped_early")):
        reporter.say(f"{folder} is complete; delete it to start again.")
        return result

    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch_size(settings.batch_size, mesh, "train.batch_size")
    if settings.micro_batch:
        parallel.check_batch_size(settings.micro_batch, mesh, "train.micro_batch")
    # before the backbone, which may take minutes: most mistakes are in the data
    rows = {
        name: load_rows(task, name, None if name == "train" else settings.eval_rows)
        for name in ("train", "validation", "test")
        if name != "test" or task.test
    }
    reporter.say(f"loading {config.backbone}")
    backbone = load_backbone(
        config.backbone,
        dtype=config.model.dtype,
        weights=config.model.weights,
        mesh=mesh,
        dropout=config.model.dropout,
        unroll=config.model.unroll,
        remat=config.model.remat,
        attention=config.model.attention,
        trainable=not method.uses_prompt,
    )
    tokenizer = load_tokenizer(
        config.tokenizer or backbone.path, one_sequence=family.one_sequence(backbone.config)
    )

    length = config.prompt.length if method.uses_prompt else 0

    def split(name: str, prompt_length: int = length) -> Split:
        vocabulary, origin = backbone.config.vocab_size, getattr(task, name)
        examples = tokenize(task, rows[name], tokenizer, prompt_length, vocabulary, origin=origin)
        return Split(examples, references(task, rows[name], origin))

    training, validation = split("train"), split("validation")
    lengths = [[len(e.inputs) for e in part.examples] for part in (training, validation)]
    parallel.check_same("backbone or data", [backbone.fingerprint, *lengths])
    test = split("test") if task.test else None
    reporter.say(
        f"task {task.name}: {len(training.examples)} training rows, "
        f"{len(validation.examples)} validation rows"
    )

    def start_of(member: RunConfig) -> Any:
        start = np.zeros((0, backbone.config.d_model), np.float32)
        if method.uses_prompt:
            start = initial_prompt(
                member.prompt.model_copy(update={"length": method.rows(member.prompt)}),
                backbone.params["token_embedder"]["embedding"],
                encode=tokenizer.encode,
                special_ids=tokenizer.special_ids,
                pieces=min(tokenizer.size, backbone.config.vocab_size),
                labels=[
                    ids[:-1] for ids in tokenizer.encode_targets(task.labels or (), task.separator)
                ],
                seed=member.train.seed,
                from_file=lambda path: load_prompt(path).vectors,
            )
        return method.init(backbone.params, start[None], member.prompt, member.train.seed)

    members = config.members()
    starts = [start_of(member) for member in members]  # before anything is written
    shape = family.specialise(backbone.config, [e.inputs for e in training.examples], length)

    def optimizer_of(alive: Sequence[int]):
        # a run that went back once or more goes on with a lower rate
        rates = [members[k].train.learning_rate for k in alive]
        return per_prompt(settings, [rate * 0.5 ** progress["rolled_back"] for rate in rates])

    def training_of(alive: Sequence[int], done: int):
        """The step of these members and their batches from ``done`` on."""
        devices = parallel.ways(mesh)
        model, micro = family.cut(
            shape, lengths[0], batch_size=settings.batch_size * len(alive), devices=devices,
            rows=settings.micro_batch,
            share=settings.length_window == 0,  # else hardly a position is padding, totals differ
        )  # fmt: skip
        step = make_train_step(
            model, method, optimizer_of(alive), mesh=mesh, z_loss=settings.z_loss
        )
        batches = training_batches(
            training.examples,
            batch_size=settings.batch_size,
            seeds=[members[k].train.seed for k in alive],
            start=done,
            window=settings.length_window,
            rows=micro,
            widths=family.widths(model),
            devices=devices,
            own=partial(with_prompt, vocabulary=backbone.config.vocab_size, length=length),
        )
        return step, batches

    def measure(params, bank, on: Split) -> list[dict[str, float]]:
        """The metrics of every prompt of the bank (of one model without), in the same batches."""
        model = Model(params, bank, backbone.config, mesh)
        each = answer_each(model, task, on.examples, tokenizer, batch_size=settings.eval_batch_size)
        return [measure_answers(task, found.predictions, on.references) for found in each]

    def open_folder() -> None:
        open_files.enter_context(open_run(config))

    parallel.by_first(open_folder)
    open_files.enter_context(signals.held())
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep, reporter.say)
    metric, count = task.metrics[0], len(members)
    progress: dict[str, Any] = {
        "alive": list(range(count)), "best": [-math.inf] * count, "best_step": [-1] * count,
        "trained": [0] * count, "stale": 0, "seconds": 0.0, "evaluated": 0, "rolled_back": 0,
    }  # fmt: skip

    if checkpoints.latest_step() is not None:
        progress = checkpoints.progress()
        if "evaluated" not in progress:
            raise UserError(
                f"The checkpoints in {str(folder)!r} are of an earlier version; delete the "
                "directory to start again, or choose another output."
            )
    alive = progress["alive"]
    tree = stacked([starts[k] for k in alive])
    del starts  # of full fine-tuning it is the model
    state = TrainState(jax.numpy.int32(0), tree, optimizer_of(alive).init(tree))
    del tree
    state = jax.device_put(state, parallel.replicated(mesh))
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        reporter.say(f"going on from step {int(state.step)}")
    done = int(state.step)
    train_step, batches = training_of(alive, done)
    logbook = Logbook(
        folder, done if "untuned" in progress else -1, tensorboard=settings.tensorboard
    )  # fmt: skip
    open_files.callback(logbook.close)
    if "untuned" not in progress:
        plain = split("validation", prompt_length=0)
        with signals.free():
            untuned = measure(backbone.params, None, plain)[0][metric]
        majority_score = majority(task.metrics[0], validation.references, task.labels)
        progress |= {"untuned": untuned, "majority": majority_score}
        logbook.write({"step": 0, f"untuned/{metric}": untuned, "majority": majority_score})
        checkpoints.save(0, state, progress)

    clock = Clock(progress["seconds"])
    pending = None  # the losses of the step before, fetched while the next one runs

    def flush() -> None:
        nonlocal pending
        now, pending = pending, None
        if now is not None:
            _log(now, logbook, reporter, clock, progress, metric)

    def evaluate() -> None:
        """Judge the prompts at ``done``, keep the best, and stop the worse half where asked."""
        nonlocal state, alive, train_step, batches
        params, bank = method.apply(state.tree, backbone.params)
        with signals.free():
            scores = measure(params, bank, validation)
        ahead = max(progress["best"])
        for place, (k, found) in enumerate(zip(alive, scores, strict=True)):
            progress["trained"][k] = done
            if not found[metric] > progress["best"][k]:
                continue
            progress["best"][k], progress["best_step"][k] = found[metric], done
            mine = None if bank is None else bank[place : place + 1]
            facts = facts_of(members[k], task, backbone, found, done, len(validation.examples))
            if count > 1:
                save_tuned(folder / "population" / str(k), params, mine, backbone, facts)
            others = progress["best"][:k] + progress["best"][k + 1 :]
            if found[metric] > max([ahead, *others]):
                save_tuned(folder, params, mine, backbone, facts)
        progress["stale"] = 0 if max(progress["best"]) > ahead else progress["stale"] + 1
        progress["evaluated"] = done
        _log_scores(logbook, reporter, done, alive, scores, metric)
        halving = settings.halve_every and done % settings.halve_every == 0
        if halving and len(alive) > 1 and done < settings.steps:
            kept = better_half(progress["best"], alive)
            state = keep_of(state, [alive.index(k) for k in kept])
            alive = progress["alive"] = kept
            train_step, batches = training_of(alive, done)
            reporter.say(f"going on with {len(alive)} of {count} prompts")

    def save() -> None:
        if not sound(state.tree).any():
            check_loss(math.nan, done)
        progress["seconds"] = clock.seconds()
        checkpoints.save(done, state, progress)

    while True:
        try:
            last = done == settings.steps
            if progress["evaluated"] < done and (last or done % settings.evaluate_every == 0):
                flush()
                evaluate()
            stopped = bool(settings.patience and progress["stale"] >= settings.patience)
            # who may go back needs the best prompt's scores beside it, or would keep a lost one
            judged = settings.on_divergence == "go_back" and 0 < progress["evaluated"] == done
            if last or stopped or judged or (done and done % settings.checkpoint_every == 0):
                flush()
                save()
            if last or stopped:
                break
            signals.check(done)
            batch = next(batches)  # as micro-batches
            state, losses = train_step(state, backbone.params, parallel.put_batch(batch, mesh))
            done += 1
            clock.count(batch)
            flush()
            pending = done, losses, alive
        except Interrupted as why:
            flush()
            save()
            raise Interrupted(f"{why} after step {done}, which is saved") from None
        except Diverged:
            if settings.on_divergence == "stop" or progress["rolled_back"] == MOST_ROLLBACKS:
                raise
            pending, at, times = None, done, progress["rolled_back"] + 1
            progress = checkpoints.progress() | {"rolled_back": times}
            alive = progress["alive"]
            state = checkpoints.restore(room_for(len(alive), state))
            done = int(state.step)
            train_step, batches = training_of(alive, done)
            logbook.back_to(done)
            reporter.say(
                f"warning: the loss was no number at step {at}; going on from step {done} with "
                f"{0.5**times:g} of the learning rate"
            )

    # the one in prompt/: of equals the first to be there
    winner = min(range(count), key=lambda k: (-progress["best"][k], progress["best_step"][k], k))
    result = {
        "task": task.name,
        "method": config.method,
        "metric": metric,
        "value": progress["best"][winner],
        "majority": progress["majority"],
        "untuned": progress["untuned"],
        "rows": len(validation.examples),
        "best_step": progress["best_step"][winner],
        "steps": done,
        "stopped_early": stopped,
        "seconds": round(clock.seconds(), 3),
        "examples_per_second": round(
            sum(progress["trained"]) * settings.batch_size / max(clock.seconds(), 1e-9), 3
        ),
        "trainable_parameters": sum(x.size for x in jax.tree.leaves(state.tree)) // len(alive),
        "frozen_parameters": small_weights.count(backbone.params) if method.uses_prompt else 0,
        "prompt": str(folder / "prompt") if method.uses_prompt else None,
        "model": None if method.uses_prompt else str(folder / "model"),
    }
    if count > 1:
        result["population"] = table(config, progress)
        markdown = as_markdown(result["population"], metric)
        if jax.process_index() == 0:
            write_atomically(folder / "population.md", markdown)
        reporter.say(markdown)
    if test is not None:
        params, bank = backbone.params, None
        if method.uses_prompt:
            like = np.zeros((length, backbone.config.d_model), np.float32)
            best = parallel.from_first(lambda: load_prompt(folder / "prompt").vectors, like)
            # placed as in training, where what answers has been compiled
            bank = jax.device_put(best[None], parallel.replicated(mesh))
        else:
            params = load_backbone(
                str(folder / "model"), dtype=config.model.dtype, mesh=mesh
            ).params
        with signals.free():
            result["test"] = measure(params, bank, test)[0]
    if jax.process_index() == 0:
        draw_curves(logbook.rows, metric, progress["majority"], folder / "curves.png")
        write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _log(pending, logbook: Logbook, reporter, clock: Clock, progress, metric: str) -> None:
    step, losses, alive = pending
    each, accuracy = (np.asarray(x) for x in jax.device_get(losses))
    sound = np.isfinite(each)
    if not sound.any():
        check_loss(float(each[0]), step)
    # of a population some may diverge, which is nothing to the others
    loss, right, rates = float(each[sound].mean()), float(accuracy[sound].mean()), clock.rates()
    if step % LOG_EVERY == 0:
        members = zip(alive, each, strict=True) if len(progress["best"]) > 1 else ()
        own = {f"prompt{k}/loss": float(x) for k, x in members if math.isfinite(x)}
        logbook.write({"step": step, "loss": loss, "token_accuracy": right, **own, **rates})
    best = max(progress["best"])
    shown = {f"best {metric}": best} if math.isfinite(best) else {}
    reporter.step(step, {"loss": loss, **shown, **rates})


def _log_scores(logbook: Logbook, reporter, step: int, alive, scores, metric: str) -> None:
    """The best prompt's metrics as the run's, and those of each where there are several."""
    best = max(scores, key=lambda found: found[metric])
    row = {f"validation/{name}": value for name, value in best.items()}
    if len(alive) > 1:
        for k, found in zip(alive, scores, strict=True):
            row |= {f"prompt{k}/validation/{name}": value for name, value in found.items()}
    logbook.write({"step": step, **row})
    among = f", the best of {len(alive)} prompts" if len(alive) > 1 else ""
    reporter.say(f"step {step}: validation {metric} {best[metric]:.4f}{among}")
