"""Pre-training and adaptation of a backbone: the loop around the same train step."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.data.batches import Batch, make_batch, random_stream
from jaxprompt.data.text import (
    Stream,
    Streams,
    check_files,
    open_streams,
    packed_batch,
    packed_batches,
    read_documents,
)
from jaxprompt.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from jaxprompt.data.tokenizer_training import train_tokenizer
from jaxprompt.evaluation.plots import draw_losses
from jaxprompt.inference import generate
from jaxprompt.methods.base import PRETRAINING, lent
from jaxprompt.models import precision
from jaxprompt.models.checkpoints import hub
from jaxprompt.models.checkpoints.load import fingerprint, load_backbone, save_hf
from jaxprompt.models.ops.attention import flash_attention
from jaxprompt.models.t5 import t5
from jaxprompt.runtime import parallel, processes
from jaxprompt.runtime.devices import crowding, describe
from jaxprompt.runtime.files import replace_directory
from jaxprompt.runtime.signals import Interrupted, Signals
from jaxprompt.training import inputs
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.logbook import (
    LOG_EVERY,
    MetricWriter,
    NullReporter,
    Throughput,
    check_loss,
    load_result,
    open_run,
    write_atomically,
)
from jaxprompt.training.optimizer import per_prompt, schedule_warnings
from jaxprompt.training.step import (
    TrainState,
    batch_losses,
    first_state,
    init_state,
    make_train_step,
    shardings,
    sound,
)

SAMPLES = 3  # fill-in-the-blank samples of each held-out source
HELD_OUT_SEED = 20_201  # the held-out batches are the same for every run

_init = jax.jit(t5.init_params, static_argnums=0)


def pretrain(
    config: PretrainConfig, reporter: Any = None, signals: Signals | None = None
) -> dict[str, Any]:
    """Run or resume ``config`` in its output directory and return what ``result.json`` holds.

    The directory gets ``model`` (a Hugging Face directory with tokenizer, usable as a backbone),
    ``metrics.jsonl``, ``losses.png``, ``samples.jsonl`` and ``checkpoints``. Killed at any moment
    and called again, it ends with bit-identical weights. ``signals``: as in ``loop.train``.
    """
    with contextlib.ExitStack() as open_files:
        signals = signals or Signals(install=False)
        return _pretrain(config, reporter or NullReporter(), signals, open_files)


def _pretrain(
    config: PretrainConfig, reporter: Any, signals: Signals, open_files: contextlib.ExitStack
):
    config = precision.resolve_config(config)
    settings, folder = config.train, Path(config.output)
    processes.assert_equal_across_processes("config", config.model_dump(exclude={"output"}))
    result = processes.on_process_zero(lambda: load_result(config))
    if result:
        reporter.say(
            f"{folder} is complete after {result['steps']} steps; delete it to start again."
        )
        return result
    check_files(config)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch_size(settings.batch_size, mesh, "train.batch_size")
    shape, params, loaded = _start(config, mesh, reporter)

    def open_folder() -> None:
        open_files.enter_context(open_run(config))

    @functools.cache  # once, at the first that writes
    def begin() -> None:
        processes.on_process_zero(open_folder)

    place = _tokenizer_place(config, folder, begin, reporter)
    tokenizer = load_tokenizer(place)
    processes.assert_equal_across_processes("tokenizer", tokenizer.identity())
    if shape is None:
        shape = _shape(config, tokenizer.ids, mesh)
    tokenizer = tokenizer.for_table(shape.vocab_size)
    begin()
    for warning in schedule_warnings(settings):
        reporter.say(f"warning: {warning}")
    reporter.say(f"tokenizing; computing on {describe()}")
    if told := crowding(mesh.devices.flatten().tolist()):
        reporter.say(f"warning: {told}")
    streams = open_streams(config, tokenizer, shape.vocab_size, folder / "tokens", reporter.say)
    sizes = ", ".join(f"{name} {count:,}" for name, count in streams.tokens.items())
    reporter.say(f"tokens for training: {sizes}")
    processes.assert_equal_across_processes("backbone or data", [loaded, streams.digests])
    reads = {**streams.digests, "tokenizer": tokenizer.fingerprint()}
    if loaded is not None:
        reads |= inputs.of_backbone(shape, loaded)

    optimizer = per_prompt(settings)
    train_step = make_train_step(shape, PRETRAINING, optimizer, mesh=mesh, z_loss=settings.z_loss)
    open_files.enter_context(signals.held())
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep, reporter.say, in_parts=True)
    done, progress = 0, {"seconds": 0.0, "tokens": 0, "evaluated": 0}
    if checkpoints.latest_step() is not None:
        params = None  # what is restored needs their memory
        progress |= checkpoints.progress()
        inputs.check_inputs(folder, progress.get("inputs"), reads)
        like = _state_shapes(config, shape, optimizer)
        like = parallel.with_sharding(like, shardings(like, PRETRAINING, shape, mesh))
        state: Any = checkpoints.restore(like)
        done = int(state.step)
        reporter.say(f"going on from step {done}")
    else:
        params = params or _new(shape, settings.seed, mesh)
        bank = _virtual(config, params, tokenizer, shape.d_model)
        tree, params = PRETRAINING.init(params, bank, PromptConfig(), settings.seed), None
        state = first_state(tree, PRETRAINING, optimizer, shape, mesh)
        del tree
    progress["inputs"] = reads
    logbook = MetricWriter(
        folder, done if done else -1, tensorboard=settings.tensorboard, say=reporter.say
    )
    open_files.callback(logbook.close)
    checks = held_out_batches(config, streams)

    def evaluate(state: TrainState) -> dict[str, dict[str, float]]:
        with lent(state.tree["model"]) as params, signals.free():
            return held_out_scores(params, state.tree.get("prompt"), checks, shape, mesh)

    def log_scores(step: int, scores) -> None:
        row = {f"held_out/{name}/loss": s["loss"] for name, s in scores.items()}
        logbook.write({"step": step, "tokens": progress["tokens"], **row})
        mean = np.mean([s["loss"] for s in scores.values()])
        reporter.say(f"step {step}: held-out loss {mean:.4f} (mean of {len(scores)} sets)")

    def flush(pending) -> None:
        if pending is None:
            return
        step, losses = pending
        loss, accuracy = (float(np.mean(jax.device_get(x))) for x in losses)
        check_loss(loss, step)
        rates = clock.rates()
        if step % LOG_EVERY == 0:
            row = {"loss": loss, "token_accuracy": accuracy, "tokens": progress["tokens"], **rates}
            logbook.write({"step": step, **row})
        reporter.step(step, {"loss": loss, **rates})

    def save() -> None:
        if not sound(state.tree).all():
            check_loss(math.nan, done)
        progress["seconds"] = clock.seconds()
        if checkpoints.latest_step() != done:
            # of an earlier number of steps: it tells of the model that is replaced
            processes.on_process_zero(lambda: (folder / "result.json").unlink(missing_ok=True))
            save_model(folder, shape, state, place)
        checkpoints.save(done, state, progress)

    if done == 0:
        log_scores(0, evaluate(state))
    batches = packed_batches(config, streams.train, done)
    clock, pending, scores = Throughput(progress["seconds"]), None, None
    while True:
        try:
            last = done >= settings.steps
            if progress["evaluated"] < done and (last or done % settings.evaluate_every == 0):
                pending = flush(pending)
                scores = evaluate(state)
                log_scores(done, scores)
                progress["evaluated"] = done
            if last or (done and done % settings.checkpoint_every == 0):
                pending = flush(pending)
                save()
            if last:
                break
            signals.check(done)
            batch = next(batches)
            state, losses = train_step(state, {}, [parallel.put_batch(batch, mesh)])
            done += 1
            clock.count([batch])
            progress["tokens"] += _size(batch)
            flush(pending)
            pending = done, losses
        except Interrupted as why:
            flush(pending)
            save()
            raise Interrupted(f"{why} after step {done}, which is saved") from None

    scores = scores or evaluate(state)
    trained, state = state.tree["model"], None  # what is left of the state is not needed
    with lent(trained) as params:
        samples = fill_in(config, shape, params, streams, tokenizer, mesh)
        found = {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "fingerprint": fingerprint(params),
        }
    result = {
        "steps": done,
        "tokens": progress["tokens"],
        "seconds": round(clock.seconds(), 3),
        "tokens_per_second": clock.rates()["tokens_per_second"],
        **found,
        "start": config.start,
        "loss": float(np.mean([s["loss"] for s in scores.values()])),
        "held_out": scores,
        "source_tokens": streams.tokens,
        "inputs": reads,
        "model": str(folder / "model"),
    }
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)

    def write() -> None:
        write_atomically(folder / "samples.jsonl", lines)
        draw_losses(logbook.rows, folder / "losses.png")
        write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")

    processes.on_process_zero(write)
    return result


def _start(
    config: PretrainConfig, mesh: Mesh, reporter
) -> tuple[t5.T5Config | None, t5.Params | None, str | None]:
    """The backbone that a run starts from, if it starts from one: shape, weights, fingerprint."""
    if config.start is None:
        return None, None, None
    reporter.say(f"loading {config.start}")
    model = config.model
    backbone = load_backbone(
        config.start, mesh=mesh, dropout=model.dropout, unroll=model.unroll, remat=model.remat
    )
    if not isinstance(backbone.config, t5.T5Config):
        raise UserError(
            f"start {config.start!r} is decoder-only, and the objectives here are T5's; start from "
            "a T5, or tune that model with method: model-tuning."
        )
    shape = dataclasses.replace(backbone.config, **_chosen(config, mesh))
    return shape, backbone.params, backbone.fingerprint


def _shape(config: PretrainConfig, pieces: int, mesh: Mesh) -> t5.T5Config:
    """A T5 1.1 for a vocabulary of ``pieces``, rounded up to a multiple of 128."""
    model = config.model
    shape = t5.T5Config(
        vocab_size=-(-pieces // 128) * 128,
        **config.shape.model_dump(),
        dropout=model.dropout,
        unroll=bool(model.unroll),
        remat=model.remat,
        rows_in_turn=parallel.whole_rows_on_cpu(mesh),
        **_chosen(config, mesh),
    )
    check = lambda x, of: parallel.check_divides(mesh, of, x.shape, "the new backbone")
    parallel.map_with_axes(check, t5.abstract_params(shape), t5.logical_axes(shape))
    return shape


def _chosen(config: PretrainConfig, mesh: Mesh) -> dict[str, Any]:
    dtype, packed = config.model.dtype, _widths(config)
    flash = flash_attention.kernel(config.model.flash, str(dtype), mesh)
    return {"dtype": dtype, "flash": flash, "packed": packed}


def _widths(config: PretrainConfig) -> tuple[int, ...]:
    """What lengths of the examples that share a row are rounded up to."""
    return tuple(sorted({-(-config.input_length // n) for n in (8, 4, 2, 1)}))


def _tokenizer_place(
    config: PretrainConfig, folder: Path, begin: Callable[[], None], reporter
) -> str:
    """Where the tokenizer is; one that the config asks to train is trained first, once."""
    if isinstance(config.tokenizer, str):
        return config.tokenizer
    if config.tokenizer is None:
        return hub.resolve(str(config.start))
    place, settings = folder / "tokenizer", config.tokenizer
    made_of = json.dumps([settings.model_dump(), [source.model_dump() for source in config.text]])
    note = place / "trained_on.json"

    def is_there() -> bool:
        trained = (place / "tokenizer.json").is_file()
        going_on = any(folder.glob("checkpoints/*"))  # then the settings are the same
        return trained and (going_on or (note.is_file() and note.read_text() == made_of))

    def train() -> None:
        share = settings.characters // len(config.text) if config.text else 0
        texts = (text for source in config.text for text in _some(read_documents(source), share))

        def write(path: Path) -> None:
            train_tokenizer(texts, settings, path)
            (path / note.name).write_text(made_of)

        replace_directory(place, write, lambda old: (old / note.name).is_file())

    # by the first process alone: another training may come to another vocabulary
    if not processes.on_process_zero(is_there):
        begin()
        reporter.say(f"training a tokenizer of {settings.vocabulary} rows")
        processes.on_process_zero(train)
    return str(place)


def _some(texts: list[str], characters: int) -> list[str]:
    """Evenly spaced ones of the texts, of about so many characters together."""
    step = max(1, -(-sum(map(len, texts)) // max(characters, 1)))
    return texts[::step]


def _new(shape: t5.T5Config, seed: int, mesh: Mesh) -> t5.Params:
    """Random weights, each part of them made where it belongs."""
    key = jax.random.key(seed)
    if mesh.size == 1:
        return _init(shape, key)
    specs = parallel.specs_of(mesh, t5.abstract_params(shape), t5.logical_axes(shape))
    place = parallel.named_shardings(mesh, specs)
    return jax.jit(t5.init_params, static_argnums=0, out_shardings=place)(shape, key)


def _state_shapes(config: PretrainConfig, shape: t5.T5Config, optimizer: Any) -> TrainState:
    """Shapes and dtypes of a state, of which nothing is allocated."""
    bank = np.zeros((1, _virtual_count(config), shape.d_model), np.float32)
    begin = functools.partial(init_state, PRETRAINING, optimizer)
    return jax.eval_shape(lambda params: begin(params, bank), t5.abstract_params(shape))


def _virtual_count(config: PretrainConfig) -> int:
    return config.virtual.count * max(config.virtual.lengths) if config.virtual else 0


def _virtual(
    config: PretrainConfig, params: t5.Params, tokenizer: Tokenizer, d_model: int
) -> Float[np.ndarray, "1 n D"]:
    """Vectors of all virtual tokens as one long prompt, each a random word's to begin with."""
    if config.virtual is None:
        return np.zeros((1, 0, d_model), np.float32)
    rng = np.random.default_rng(config.train.seed)
    special = {*tokenizer.special_ids, *tokenizer.sentinel_ids}
    words = [id for id in range(tokenizer.size) if id not in special]
    chosen = rng.choice(words, _virtual_count(config)).astype(np.int32)
    rows = processes.fetch(params["token_embedder"]["embedding"][chosen])
    return np.asarray(rows, np.float32)[None]


def held_out_batches(config: PretrainConfig, streams: Streams) -> dict[str, list[Batch]]:
    """A few packed batches of each held-out stream."""
    return {
        stream.name: [
            packed_batch(config, [stream], [1.0], random_stream(HELD_OUT_SEED, number))
            for number in range(config.train.evaluate_batches)
        ]
        for stream in streams.held_out
    }


def held_out_scores(
    params: t5.Params,
    bank: Float[Array, "1 P D"] | None,
    checks: dict[str, list[Batch]],
    config: t5.T5Config,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, float]]:
    """Loss in nats a target token, perplexity, share of right tokens and their number by set."""
    scores, sums = {}, _sums(config, mesh)
    put = lambda batch: batch if mesh is None else parallel.put_batch(batch, mesh)
    for name, batches in checks.items():
        found = [np.asarray(sums(params, bank, put(batch))) for batch in batches]
        nll, right, count = (float(x) for x in np.sum(found, axis=0))
        scores[name] = {
            "loss": nll / count,
            "perplexity": math.exp(min(nll / count, 700)),
            "token_accuracy": right / count,
            "tokens": int(count),
        }
    return scores


@functools.lru_cache(maxsize=8)
def _sums(config: t5.T5Config, mesh: Mesh | None) -> Callable[..., Float[Array, " 3"]]:
    """Sums over target tokens of negative log-likelihood, of correct ones, and of ones."""

    def of_rows(params, bank, batch):
        weights = (batch.target_segments > 0).astype(jnp.float32)
        flat = batch._replace(weights=weights, dropout_seed=None)
        _, losses = batch_losses(params, bank, config, flat, prompts=1)
        count = jnp.sum(flat.weights)
        return jnp.stack([losses.loss[0] * count, losses.accuracy[0] * count, count])

    everywhere = parallel.shard_over_batch(of_rows, mesh, t5.logical_axes(config), stacked=True)
    return jax.jit(lambda *args: parallel.psum_over_batch(everywhere(*args), mesh))


def _size(batch: Batch) -> int:
    return int((batch.segments > 0).sum() + (batch.target_segments > 0).sum())


def save_model(folder: Path, shape: t5.T5Config, state: TrainState, tokenizer: str) -> None:
    """Write the backbone as a Hugging Face directory with its tokenizer, complete or not at all.

    All processes call it, and the first one writes.
    """
    weights = processes.fetch_to_zero(state.tree["model"])
    if jax.process_index() != 0:
        return

    def write(path: Path) -> None:
        save_hf(path, shape, jax.tree.map(lambda x: x[0], weights))
        if Path(tokenizer).is_dir():
            copy_tokenizer(tokenizer, path)
        else:  # a hub id
            load_tokenizer(tokenizer).save(path)

    replace_directory(folder / "model", write, lambda old: (old / "config.json").is_file())


def fill_in(
    config: PretrainConfig,
    shape: t5.T5Config,
    params: t5.Params,
    streams: Streams,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> list[dict[str, str]]:
    """What the model writes for a few held-out examples of each text stream, for people to read.

    All processes call it: the weights may be over the devices of all.
    """
    rows: list[tuple[Stream, Any]] = []
    for stream in streams.held_out:
        if not stream.name.startswith("pairs/"):
            rng = random_stream(HELD_OUT_SEED, 1_000_000)
            rows += [(stream, stream.draw(rng)) for _ in range(SAMPLES)]
    if not rows:
        return []
    batch = make_batch([e for _, e in rows], input_length=config.input_length)
    inputs, segments = (
        parallel.device_put_global(np.asarray(x), parallel.replicated(mesh))
        for x in (batch.inputs, batch.segments)
    )
    written = generate.greedy(params, None, shape, inputs, segments, config.target_length)
    return [
        {
            "held_out": stream.name,
            "input": tokenizer.show(example.inputs),
            "target": tokenizer.show(example.targets),
            "written": tokenizer.show(ids),
        }
        # -1, where logits were no numbers, becomes padding
        for (stream, example), ids in zip(
            rows, np.maximum(processes.fetch(written), 0), strict=True
        )
    ]
