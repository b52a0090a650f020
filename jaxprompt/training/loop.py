"""A run from top to bottom: backbone, data, prompt, steps, evaluations, checkpoints, result."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.data.batches import Room, training_batches, with_prompt
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.evaluation.metrics import majority
from jaxprompt.evaluation.metrics import measure as measure_answers
from jaxprompt.evaluation.plots import draw_curves
from jaxprompt.inference.engine import Engine
from jaxprompt.inference.predict import predict_per_prompt, refuse_lost
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.base import METHODS, applied, lent
from jaxprompt.models import precision, registry
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes
from jaxprompt.runtime.devices import crowding, describe
from jaxprompt.runtime.signals import Interrupted, Signals
from jaxprompt.training import inputs
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.datasets import (
    Split,
    assign,
    read_splits,
    split_of,
    target_warnings,
    tasks_of,
    truncation_warnings,
)
from jaxprompt.training.logbook import (
    Diverged,
    MetricName,
    MetricWriter,
    NullReporter,
    Throughput,
    check_members,
    checkpoint_folders,
    load_result,
    log_scores,
    log_step,
    open_run,
    write_atomically,
)
from jaxprompt.training.optimizer import per_prompt, schedule_warnings
from jaxprompt.training.population import (
    as_markdown,
    better_half,
    keep_of,
    length_warnings,
    stacked,
    start_of,
    start_warnings,
    table,
    winner,
)
from jaxprompt.training.results import (
    bring_back,
    facts_of,
    note_test,
    save_tuned,
    tidy,
    tuned_in,
)
from jaxprompt.training.step import (
    TrainState,
    first_state,
    make_train_step,
    shardings,
    sound,
)

MOST_ROLLBACKS = 10  # the rate is then a thousandth


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
        return _train(config, reporter or NullReporter(), signals, open_files)


def _train(
    config: RunConfig, reporter: Any, signals: Signals, open_files: contextlib.ExitStack
) -> dict[str, Any]:
    config = precision.resolve_config(config)
    method, settings = METHODS[config.method], config.train
    processes.assert_equal_across_processes("config", config.model_dump(exclude={"output"}))
    members = config.members()
    task_of = tasks_of(members)
    tasks = {task.name: task for task in task_of}
    folder = Path(config.output)
    result: Any = processes.on_process_zero(lambda: load_result(config))
    if result:
        for task in tasks.values():
            inputs.check_inputs(
                folder, result.get("inputs"), inputs.of_files(task, settings.max_eval_examples)
            )
        reporter.say(
            f"{folder} is complete after {result['steps']} steps; delete it to start again."
        )
        return result

    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch_size(settings.batch_size, mesh, "train.batch_size")
    if settings.micro_batch_size:
        parallel.check_batch_size(settings.micro_batch_size, mesh, "train.micro_batch_size")
    # before the backbone, which may take minutes: most mistakes are in the data
    rows = {name: read_splits(task, settings.max_eval_examples) for name, task in tasks.items()}
    reporter.say(f"loading {config.backbone}, {config.model.dtype}, on {describe()}")
    backbone = load_backbone(
        config.backbone,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        mesh=mesh,
        dropout=config.model.dropout,
        unroll=config.model.unroll,
        remat=config.model.remat,
        attention=config.model.attention,
        trainable=not method.uses_prompt,
        flash=config.model.flash,
    )
    tokenizer = load_tokenizer(
        config.tokenizer or backbone.path, one_sequence=registry.one_sequence(backbone.config)
    )

    vocabulary = backbone.config.vocab_size
    tokenizer = tokenizer.for_table(vocabulary)
    length_of = [member.prompt.length if method.uses_prompt else 0 for member in members]
    assigned = {
        (name, length): assign(tasks[name], rows[name], tokenizer, length, vocabulary)
        for name, length in dict.fromkeys(
            (task.name, length) for task, length in zip(task_of, length_of, strict=True)
        )
    }
    own = [assigned[task.name, length] for task, length in zip(task_of, length_of, strict=True)]
    digests = [part.digest() for given in assigned.values() for part in given.splits()]
    processes.assert_equal_across_processes("backbone or data", [backbone.fingerprint, *digests])
    for name, splits in rows.items():
        told = {"training": "train", "validation": "validation", "test": "test"}
        counts = [f"{len(splits[s])} {word} rows" for word, s in told.items() if s in splits]
        reporter.say(f"task {name}: {', '.join(counts)}")
    reads = inputs.of_backbone(backbone.config, backbone.fingerprint)
    reads["tokenizer"] = tokenizer.fingerprint()
    for name, splits in rows.items():
        reads |= inputs.of_rows(tasks[name], splits)
    # test rows change nothing but the figure that is measured on them at the end
    learns = {key: value for key, value in reads.items() if not key.endswith("/test")}

    first = {given.task.name: given for given in reversed(assigned.values())}  # of each task
    cut = itertools.chain(*map(truncation_warnings, first.values()))
    odd = [text for given in first.values() for text in target_warnings(given, tokenizer)]
    longest = max(own, key=lambda given: given.length)
    sizes = length_warnings(longest.length, longest.training.examples)
    sizes += filter(None, [crowding(mesh.devices.flatten().tolist())])
    warnings = [*schedule_warnings(settings), *start_warnings(members, task_of), *cut, *odd]
    for warning in [*warnings, *sizes]:
        reporter.say(f"warning: {warning}")

    def starts_from(params) -> list[Any]:
        """The tree [1, ...] of each member before step 0."""
        source = backbone._replace(params=params)
        pairs = zip(members, task_of, strict=True)
        return [start_of(member, task, source, tokenizer) for member, task in pairs]

    # prompts before anything is written; a whole model when the loaded one is no longer needed
    starts = starts_from(backbone.params) if method.frozen else None
    shapes = jax.eval_shape(lambda: starts or starts_from(backbone.params))

    def optimizer_of(alive: Sequence[int]):  # with a lower rate where the run went back
        rates = [members[k].train.learning_rate for k in alive]
        return per_prompt(settings, [rate * 0.5 ** progress["rolled_back"] for rate in rates])

    def learning(name: str, among: Iterable[int] = range(len(members))) -> list[int]:
        return [k for k in among if task_of[k].name == name]

    def place_of(name: str) -> Path:
        return folder if len(tasks) == 1 else folder / "tasks" / name

    def called(name: str) -> str:
        return "" if len(tasks) == 1 else f"{name}/"

    def in_order(some: Iterable[int]) -> list[int]:
        """Members as their prompts follow each other in the state: those of a length together."""
        return sorted(some, key=lambda k: (length_of[k], k))

    def beginning(alive: Sequence[int], starts: Sequence[Any]) -> TrainState:
        tree = stacked([starts[k] for k in alive])
        return TrainState(jax.numpy.int32(0), tree, optimizer_of(alive).init(tree))

    def training_of(alive: Sequence[int], done: int):
        """The step of these members and their batches from ``done`` on."""
        devices, length = parallel.num_batch_shards(mesh), max(length_of[k] for k in alive)
        examples = [own[k].training.examples for k in alive]
        inputs = [e.inputs for each in {id(x): x for x in examples}.values() for e in each]
        model, micro = registry.plan_microbatches(
            registry.with_shared_prefix(backbone.config, inputs, length),
            [len(ids) for ids in inputs],
            batch_size=settings.batch_size * len(alive),
            devices=devices,
            rows=settings.micro_batch_size,
            depth=max(len(e.targets) for each in examples for e in each),
            share=settings.length_bucketing_window
            == 0,  # else hardly a position is padding, totals differ
        )
        step = make_train_step(
            model, method, optimizer_of(alive), mesh=mesh, z_loss=settings.z_loss
        )
        batches = training_batches(
            examples,
            batch_size=settings.batch_size,
            seeds=[members[k].train.seed for k in alive],
            start=done,
            window=settings.length_bucketing_window,
            rows=micro,
            widths=registry.widths(model),
            devices=devices,
            room=Room()
            if settings.micro_batch_size
            else registry.room(model, devices, training=True),
            own=partial(with_prompt, vocabulary=vocabulary, length=length),
        )
        return step, batches

    def measure(params, bank, task: TaskConfig, on: Split, of: str = "") -> list[dict[str, float]]:
        """The metrics of every prompt of the bank (of one model without), in the same batches.

        of: what is measured, where scores that are no numbers end the run. A member's metrics are
        then NaN, which is nothing to the others.
        """
        engine = Engine(params, bank, backbone.config, mesh)
        each = predict_per_prompt(
            engine, task, on.examples, tokenizer, batch_size=settings.eval_batch_size
        )
        for found in each if of else ():
            refuse_lost(found.lost, len(on.examples), of)
        return [
            measure_answers(task, found.predictions, on.references)
            if not found.lost
            else dict.fromkeys(task.metrics, math.nan)
            for found in each
        ]

    def scores_of(alive: Sequence[int], params, bank) -> list[dict[str, float]]:
        """The validation metrics of these members, whose prompts the bank holds."""
        found: dict[int, dict[str, float]] = {}
        for given in assigned.values():
            places = [place for place, k in enumerate(alive) if own[k] is given]
            if not places:
                continue
            mine = bank if len(assigned) == 1 else bank[np.array(places), : given.length]
            scores = measure(params, mine, given.task, given.validation)
            found |= zip(places, scores, strict=True)
        return [found[place] for place in range(len(alive))]

    def open_folder() -> None:
        open_files.enter_context(open_run(config))

    processes.on_process_zero(open_folder)
    open_files.enter_context(signals.held())
    checkpoints = Checkpoints(
        folder / "checkpoints", settings.keep, reporter.say, in_parts=not method.frozen
    )
    count = len(members)
    shown = [MetricName(called(given.task.name), given.metric) for given in own]
    progress: dict[str, Any] = {
        "alive": in_order(range(count)), "best": [-math.inf] * count, "best_step": [-1] * count,
        "trained": [0] * count, "stale": 0, "seconds": 0.0, "evaluated": 0, "rolled_back": 0,
    }  # fmt: skip

    if checkpoints.latest_step() is not None:
        progress = checkpoints.progress()
        if not isinstance(progress.get("untuned"), dict):
            raise UserError(
                f"The checkpoints in {str(folder)!r} are of an earlier version; delete the "
                "directory to start again, or choose another output."
            )
        inputs.check_inputs(folder, progress.get("inputs"), learns)
    progress["inputs"] = learns

    def steps_in() -> dict[Path, int]:
        """Where the best of each prompt and of each task lies, and of which step; -1: none yet."""
        best, steps, several = progress["best"], progress["best_step"], range(count * (count > 1))
        found = {folder / "population" / str(k): steps[k] for k in several}
        for name in tasks:
            found[place_of(name)] = steps[winner(best, steps, in_order(learning(name)))]
        return found

    def keep(place: Path, tree, mine, facts: dict[str, Any], held: dict[Path, int]) -> None:
        """Save what is tuned in its place; what was there stays aside if a checkpoint names it."""
        if jax.process_index() == 0:
            (folder / "result.json").unlink(missing_ok=True)  # of an earlier number of steps
        saved = checkpoints.latest_step()
        known = held[place] if saved is not None and held[place] <= saved else -1
        save_tuned(place, tree, mine, backbone, facts, known)
        held[place] = done

    def match_tuned() -> None:
        """Let what was saved of the best be what the checkpoint says."""
        for place, step in steps_in().items():
            bring_back(tuned_in(place, method.uses_prompt), step, folder / "result.json")

    alive, resumed = progress["alive"], checkpoints.latest_step() is not None
    done = checkpoints.latest_step() or 0
    processes.on_process_zero(match_tuned)
    train_step, batches = training_of(alive, done)
    logbook = MetricWriter(
        folder,
        done if "untuned" in progress else -1,
        tensorboard=settings.tensorboard,
        say=reporter.say,
    )
    open_files.callback(logbook.close)
    if "untuned" not in progress:
        progress |= {"untuned": {}, "majority": {}}
        row: dict[str, Any] = {"step": 0}
        for name, task in tasks.items():
            metric = task.metrics[0]
            plain = split_of(task, "validation", rows[name], tokenizer, 0, vocabulary)
            with signals.free():
                bare = measure(backbone.params, None, task, plain, of=backbone.source)[0]
            untuned = bare[metric]
            always = majority(metric, plain.references, task.labels)
            progress["untuned"][name], progress["majority"][name] = untuned, always
            row |= {f"{called(name)}untuned/{metric}": untuned, f"{called(name)}majority": always}
        logbook.write(row)

    def restored() -> TrainState:
        """The state of the newest checkpoint; no other is made for it."""
        like = jax.eval_shape(partial(beginning, alive), shapes)
        place = shardings(like, method, backbone.config, mesh)
        return checkpoints.restore(parallel.with_sharding(like, place))

    if starts is None and not resumed:
        starts = starts_from(backbone.params)
    if not method.frozen:  # the weights are part of the state
        backbone = backbone._replace(params={})
    if resumed:
        state: Any = restored()
        reporter.say(f"going on from step {done}")
    else:
        state = first_state(
            stacked([(starts or [])[k] for k in alive]), method, optimizer_of(alive),
            backbone.config, mesh,
        )  # fmt: skip
        checkpoints.save(0, state, progress)
    starts = None

    clock = Throughput(progress["seconds"])
    pending = None  # the losses of the step before, fetched while the next one runs

    def flush() -> None:
        nonlocal pending
        now, pending = pending, None
        if now is not None:
            log_step(now, logbook, reporter, clock, progress, shown)

    def evaluate() -> None:
        """Judge the prompts at ``done``, keep the best, and stop the worse half where asked."""
        nonlocal state, alive, train_step, batches
        bank = None
        if method.frozen:
            params, bank = applied(method, state.tree, backbone.params)
            with signals.free():
                scores = scores_of(alive, params, bank)
        else:
            with lent(state.tree) as params, signals.free():
                scores = scores_of(alive, params, None)
        # what is no number answers too
        fine = sound(state.tree) & np.isfinite([sum(found.values()) for found in scores])
        held = steps_in()
        ahead = {name: max(progress["best"][k] for k in learning(name)) for name in tasks}
        progress["stale"] += 1
        for place, (k, found) in enumerate(zip(alive, scores, strict=True)):
            given, score = own[k], found[own[k].metric]
            progress["trained"][k] = done
            if not (fine[place] and score > progress["best"][k]):
                continue
            progress["best"][k], progress["best_step"][k] = score, done
            mine = None if bank is None else bank[place : place + 1, : given.length]
            rows_judged = len(given.validation.examples)
            facts = facts_of(members[k], given.task, backbone, found, done, rows_judged)
            words = ("majority", "untuned")
            facts["baselines"] = {word: progress[word][given.task.name] for word in words}
            if count > 1:
                keep(folder / "population" / str(k), state.tree, mine, facts, held)
            name = given.task.name
            others = [progress["best"][j] for j in learning(name) if j != k]
            if score > max([ahead[name], *others]):
                keep(place_of(name), state.tree, mine, facts, held)
                progress["stale"] = 0
        progress["evaluated"] = done
        judged = [(k, found) for k, found, ok in zip(alive, scores, fine, strict=True) if ok]
        log_scores(logbook, reporter, done, judged, shown)
        halving = (
            settings.successive_halving_every and done % settings.successive_halving_every == 0
        )
        halves = (better_half(progress["best"], learning(n, alive)) for n in tasks)
        kept = in_order(itertools.chain(*halves))
        if halving and len(kept) < len(alive):  # also at the last step: a run may get more of them
            state = keep_of(state, [alive.index(k) for k in kept])
            alive = progress["alive"] = kept
            train_step, batches = training_of(alive, done)
            reporter.say(f"going on with {len(alive)} of {count} prompts")

    def save() -> None:
        check_members(done, alive, np.where(sound(state.tree), 0.0, math.nan), shown)
        progress["seconds"] = clock.seconds()
        if checkpoints.latest_step() == done:
            return  # what was judged since is in no checkpoint, which may name what is kept aside
        checkpoints.save(done, state, progress)
        if jax.process_index() == 0:
            oldest = min((int(f.name) for f in checkpoint_folders(checkpoints.path)), default=done)
            for place, step in steps_in().items():
                tidy(tuned_in(place, method.uses_prompt), step, oldest)

    def may_go_back() -> bool:
        return settings.on_divergence == "go_back" and progress["rolled_back"] < MOST_ROLLBACKS

    while True:
        try:
            last = done >= settings.steps
            regular = done % settings.evaluate_every == 0
            if progress["evaluated"] < done and (last or regular):
                flush()
                if not regular:
                    save()  # with more steps the run goes on from here as if never judged here
                evaluate()
            patience = settings.patience if regular else None
            stopped = bool(patience and progress["stale"] >= patience)
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
            try:
                flush()
                save()
            except Diverged:
                if not may_go_back():
                    raise
                told = f"{why} after step {done}, which is no number; the checkpoint before is good"
                raise Interrupted(told) from None
            raise Interrupted(f"{why} after step {done}, which is saved") from None
        except Diverged:
            if not may_go_back():
                raise
            pending, at, times = None, done, progress["rolled_back"] + 1
            progress = checkpoints.progress() | {"rolled_back": times, "inputs": learns}
            alive = progress["alive"]
            state = None  # its memory is needed
            state = restored()
            done = int(state.step)
            processes.on_process_zero(match_tuned)
            train_step, batches = training_of(alive, done)
            logbook.back_to(done)
            reporter.say(
                f"warning: the loss was no number at step {at}; going on from step {done} with "
                f"{0.5**times:g} of the learning rate"
            )

    def outcome(name: str) -> dict[str, Any]:
        """What came of a task: its best prompt, which is the one in prompt/."""
        k = winner(progress["best"], progress["best_step"], in_order(learning(name)))
        given, place = own[k], place_of(name)
        if progress["best_step"][k] < 0:  # there is nothing that a result could tell of
            raise UserError(
                f"No scores of task {name!r} on its validation rows were finite numbers, so that "
                "nothing was saved as the best; lower train.learning_rate, or use "
                "model.dtype=float32, in another output."
            )
        found = {
            "task": name,
            "method": config.method,
            "metric": given.metric,
            "value": progress["best"][k],
            "majority": progress["majority"][name],
            "untuned": progress["untuned"][name],
            "rows": len(given.validation.examples),
            "best_step": progress["best_step"][k],
            "trainable_parameters": sum(x.size for x in jax.tree.leaves(shapes[k])),
            "prompt": str(place / "prompt") if method.uses_prompt else None,
            "model": None if method.uses_prompt else str(place / "model"),
        }
        if given.test is not None:
            params, bank = backbone.params, None
            if method.uses_prompt:
                like = np.zeros((given.length, backbone.config.d_model), np.float32)
                best = processes.broadcast_from_zero(
                    lambda: load_prompt(place / "prompt").vectors, like
                )
                # placed as in training, where what answers has been compiled
                bank = jax.device_put(best[None], parallel.replicated(mesh))
            else:
                # by the first process, which has then written it
                model = processes.on_process_zero(lambda: str(place / "model"))
                params = load_backbone(model, dtype=config.model.dtype, mesh=mesh).params
            with signals.free():
                found["test_rows"] = len(given.test.examples)
                tuned = found["prompt"] or found["model"]
                found["test"] = measure(params, bank, given.task, given.test, of=tuned)[0]
            if method.uses_prompt:
                note_test(place / "prompt", found["test"])
        if jax.process_index() == 0:
            rows = logbook.rows_of(called(name))
            draw_curves(rows, given.metric, found["majority"], place / "curves.png")
        return found

    state = None  # a test may need its memory
    outcomes = {name: outcome(name) for name in tasks}
    result = {"tasks": outcomes} if len(tasks) > 1 else outcomes[task_of[0].name]
    result |= {
        "steps": done,
        "stopped_early": stopped,
        "seconds": round(clock.seconds(), 3),
        "examples_per_second": round(
            sum(progress["trained"]) * settings.batch_size / max(clock.seconds(), 1e-9), 3
        ),
        "frozen_parameters": quantization.count(backbone.params) if method.uses_prompt else 0,
        "inputs": reads,
    }
    if count > 1:
        result["population"] = table(config.choices(), task_of, progress)
        metrics = dict.fromkeys(given.metric for given in own)
        markdown = as_markdown(result["population"], " or ".join(metrics))
        if jax.process_index() == 0:
            write_atomically(folder / "population.md", markdown)
        reporter.say(markdown)
    if jax.process_index() == 0:
        write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result
