"""Pre-training and adaptation of a backbone: what ``fit`` needs for it."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.data.batches import Batch, Example, make_batch
from jaxprompt.data.layout import BatchLayout
from jaxprompt.data.sampling import random_stream
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
from jaxprompt.data.tokenizer_training import train_tokenizer, train_wordpiece
from jaxprompt.evaluation.plots import draw_losses
from jaxprompt.inference import generate
from jaxprompt.methods.base import Trainables, without_member_axis
from jaxprompt.methods.full import PRETRAINING
from jaxprompt.models import precision, registry
from jaxprompt.models.base import Runtime
from jaxprompt.models.checkpoints import hub
from jaxprompt.models.checkpoints.fingerprint import fingerprint
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.encoder.encoder import EncoderModel
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops.attention import flash_attention
from jaxprompt.models.t5 import t5
from jaxprompt.runtime import parallel, processes
from jaxprompt.runtime.devices import describe, oversubscription_warning
from jaxprompt.runtime.files import replace_directory, write_atomically
from jaxprompt.runtime.signals import Signals
from jaxprompt.training import inputs
from jaxprompt.training.loop import Kind, fit
from jaxprompt.training.metric_log import MetricName, Metrics, NullReporter, Reporter, StepLog
from jaxprompt.training.optimizer import per_member, schedule_warnings
from jaxprompt.training.progress import Progress
from jaxprompt.training.run_dir import Result, RunDir
from jaxprompt.training.step import (
    TrainState,
    batch_losses,
    first_state,
    init_state,
    make_train_step,
    shardings,
)
from jaxprompt.training.steps import Steps

SAMPLES = 3  # fill-in-the-blank samples of each held-out source
HELD_OUT_SEED = 20_201  # the held-out batches are the same for every run

_init = jax.jit(lambda model, key: model.init_params(key), static_argnums=0)
Params = t5.Params
Trained = t5.T5Model | EncoderModel


def pretrain(
    config: PretrainConfig, reporter: Reporter | None = None, signals: Signals | None = None
) -> Result:
    """Run or resume ``config`` in its output directory and return what ``result.json`` holds.

    The directory gets ``model`` (a Hugging Face directory with tokenizer, usable as a backbone),
    ``metrics.jsonl``, ``losses.png``, ``samples.jsonl`` and ``checkpoints``. Killed at any moment
    and called again, it ends with bit-identical weights. ``signals``: as in ``loop.train``.
    """
    kind, config = Kind(prepare, lambda config: {}), precision.resolve_config(config)
    return fit(config, kind, reporter or NullReporter(), signals or Signals(install=False))


def prepare(
    config: PretrainConfig, run: RunDir, reporter: Reporter, signals: Signals
) -> "Pretraining":
    """Load or design the backbone, and tokenize the texts.

    What takes long is kept in the run directory: a tokenizer that is trained, and tokens.

    Raises:
        UserError: texts, a start or devices that a run cannot have.
    """
    check_files(config)
    mesh, settings = parallel.make_mesh(config.mesh), config.train
    parallel.check_batch_size(settings.batch_size, mesh, "train.batch_size")
    model, params, loaded = _start(config, mesh, reporter)
    tokenizer_path = _tokenizer_place(config, run.path, run.open, reporter)
    tokenizer = load_tokenizer(tokenizer_path, masked=config.masked)
    processes.assert_equal_across_processes("tokenizer", tokenizer.identity())
    if model is None:
        model = _model(config, tokenizer, mesh)
    shape = model.config
    tokenizer = tokenizer.for_table(shape.vocab_size)
    run.open()  # tokens are written there
    for warning in schedule_warnings(settings):
        reporter.say(f"warning: {warning}")
    reporter.say(f"tokenizing; computing on {describe()}")
    if warning := oversubscription_warning(mesh.devices.flatten().tolist()):
        reporter.say(f"warning: {warning}")
    streams = open_streams(config, tokenizer, shape.vocab_size, run.path / "tokens", reporter.say)
    sizes = ", ".join(f"{name} {count:,}" for name, count in streams.tokens.items())
    reporter.say(f"tokens for training: {sizes}")
    processes.assert_equal_across_processes("backbone or data", [loaded, streams.digests])
    reads: inputs.Inputs = {**streams.digests, "tokenizer": tokenizer.fingerprint()}
    if loaded is not None:
        reads |= inputs.of_backbone(shape, loaded)
    return Pretraining(
        config=config,
        run=run,
        reporter=reporter,
        signals=signals,
        mesh=mesh,
        model=model,
        params=params,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        streams=streams,
        checks=held_out_batches(config, streams),
        optimizer=per_member(settings),
        inputs=reads,
    )


@dataclasses.dataclass
class Pretraining:
    """A run that trains a backbone; see ``loop.Job``.

    params: the weights that it starts from, until the first state is made of them.
    scored: the step of the newest held-out scores, and these.
    saved: the step of what is in ``model``, where this process has written it.
    """

    config: PretrainConfig
    run: RunDir
    reporter: Reporter
    signals: Signals
    mesh: Mesh
    model: Trained
    params: Params | None
    tokenizer: Tokenizer
    tokenizer_path: str
    streams: Streams
    checks: dict[str, list[Batch]]
    optimizer: optax.GradientTransformation
    inputs: inputs.Inputs
    scored: tuple[int, dict[str, Metrics]] | None = None
    saved: int | None = None

    @property
    def names(self) -> list[MetricName]:
        return [MetricName("", "loss")]

    @property
    def sharded(self) -> bool:
        return True

    # -- states

    def start(self) -> tuple[TrainState, Progress]:
        """The state before step 0, and its held-out loss."""
        self.run.open_metrics(-1)
        state = first_state(
            self._first_trainables(), PRETRAINING, self.optimizer, self.model, self.mesh
        )
        progress = Progress.of_trials([0], tokens=0, inputs=self.inputs)
        self._log_scores(state, progress)
        return state, progress

    def _first_trainables(self) -> Trainables:
        seed, params = self.config.train.seed, self.params
        self.params = None  # the trainables are a copy, and need the memory
        params = params or _new(self.model, seed, self.mesh)
        bank = _virtual(self.config, params, self.tokenizer, self.model.config.d_model)
        return PRETRAINING.init(params, bank, PromptConfig(), seed)

    def check(self, progress: Progress) -> None:
        """Raise UserError where a checkpoint says that the run read something else."""
        inputs.check_inputs(self.run.path, progress.inputs, self.inputs)

    def restore_files(self, progress: Progress) -> None:
        """Nothing: ``model`` is written again before the result is."""

    def abstract_state(self, progress: Progress) -> TrainState:
        """Shapes, dtypes and shardings of a state, of which nothing is allocated."""
        self.params = None  # what is restored needs their memory
        like = _state_shapes(self.config, self.model, self.optimizer)
        return parallel.with_sharding(like, shardings(like, PRETRAINING, self.model, self.mesh))

    # -- steps

    def steps(self, progress: Progress) -> Steps:
        """The compiled step and the batches from this step on."""
        step = make_train_step(
            self.model,
            PRETRAINING,
            self.optimizer,
            mesh=self.mesh,
            z_loss=self.config.train.z_loss,
        )
        batches = packed_batches(self.config, self.streams.train, progress.step)
        return Steps(step, {}, ([batch] for batch in batches), self.mesh)

    # -- evaluation

    def evaluate(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Measure and log the held-out loss. The newest weights are the ones that are kept."""
        self._log_scores(state, progress)
        return state, dataclasses.replace(progress, evaluated=progress.step)

    def _log_scores(self, state: TrainState, progress: Progress) -> None:
        scores = self._scores(state, progress.step)
        row = {f"held_out/{name}/loss": score["loss"] for name, score in scores.items()}
        self.run.metrics.write({"step": progress.step, "tokens": progress.tokens, **row})
        self.reporter.say(
            f"step {progress.step}: held-out loss {_mean_loss(scores):.4f} "
            f"(mean of {len(scores)} sets)"
        )

    def _scores(self, state: TrainState, step: int) -> dict[str, Metrics]:
        """The held-out scores of a step, which are computed once."""
        if self.scored is None or self.scored[0] != step:
            with (
                without_member_axis(state.trainables["model"]) as params,
                self.signals.interruptible(),
            ):
                bank = state.trainables.get("prompt")
                scores = held_out_scores(params, bank, self.checks, self.model, self.mesh)
            self.scored = step, scores
        return self.scored[1]

    # -- checkpoints

    def before_checkpoint(self, state: TrainState, progress: Progress) -> None:
        """Write the backbone. A result of fewer steps tells of the one that is replaced."""
        self.run.remove_result()
        save_model(self.run.path, self.model, state, self.tokenizer_path)
        self.saved = progress.step

    def after_checkpoint(self, progress: Progress) -> None:
        """Nothing: no file depends on earlier checkpoints."""

    # -- result

    def release(self, state: TrainState) -> TrainState:
        """The weights alone, once they are scored and in ``model``.

        A run that was killed between ``model`` and the checkpoint has left later weights there.
        """
        step = int(state.step)
        if self.saved != step:
            self.run.remove_result()
            save_model(self.run.path, self.model, state, self.tokenizer_path)
        self._scores(state, step)
        return state._replace(trainables={"model": state.trainables["model"]}, optimizer=())

    def finish(self, state: TrainState | None, progress: Progress, log: StepLog) -> Result:
        """Let the model fill in blanks, draw the losses and write the result."""
        assert state is not None and self.scored is not None
        scores = self.scored[1]
        with without_member_axis(state.trainables["model"]) as params:
            samples = fill_in(
                self.config, self.model, params, self.streams, self.tokenizer, self.mesh
            )
            size = sum(x.size for x in jax.tree.leaves(params))
            digest = fingerprint(params)
        result = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(log.clock.seconds(), 3),
            "tokens_per_second": log.clock.rates()["tokens_per_second"],
            "parameters": size,
            "fingerprint": digest,
            "start": self.config.start,
            "loss": _mean_loss(scores),
            "held_out": scores,
            "source_tokens": self.streams.tokens,
            "inputs": self.inputs,
            "model": str(self.run.path / "model"),
        }
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)

        def write() -> None:
            write_atomically(self.run.path / "samples.jsonl", lines)
            draw_losses(self.run.metrics.rows, self.run.path / "losses.png")
            self.run.write_result(result)

        processes.on_process_zero(write)
        return result


def _mean_loss(scores: dict[str, Metrics]) -> float:
    return float(np.mean([score["loss"] for score in scores.values()]))


def _start(
    config: PretrainConfig, mesh: Mesh, reporter: Reporter
) -> tuple[Trained | None, Params | None, str | None]:
    """The backbone that a run starts from, if it starts from one: model, weights, fingerprint."""
    if config.start is None:
        return None, None, None
    reporter.say(f"loading {config.start}")
    settings = config.model
    backbone = load_backbone(
        config.start,
        mesh=mesh,
        dropout=settings.dropout,
        unroll=settings.unroll,
        remat=settings.remat,
    )
    model = backbone.model
    if config.masked:
        if not isinstance(model, EncoderModel):
            raise UserError(
                f"start {config.start!r} is no encoder with a mask, and objective 'masked_lm' "
                "trains one; start from a BERT, or choose other objectives."
            )
        model = dataclasses.replace(model, mask_each_target=True)
        model = model.with_runtime(dtype=config.model.dtype)
        registry.check_positions(model.config, config.input_length, 1, 0)
        return model, backbone.params, backbone.fingerprint
    if not isinstance(model, t5.T5Model):
        raise UserError(
            f"start {config.start!r} is no T5, and the objectives here are T5's; start from a T5, "
            "or tune that model with method: model-tuning."
        )
    model = model.with_runtime(dtype=config.model.dtype, flash=_flash(config, mesh))
    return model.with_layout(packed_widths=_widths(config)), backbone.params, backbone.fingerprint


def _model(config: PretrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Trained:
    """A T5 1.1 or a BERT for a vocabulary, rounded up to a multiple of 128."""
    model, shape = config.model, config.shape.model_dump(exclude={"max_positions"})
    shape["vocab_size"] = -(-tokenizer.ids // 128) * 128
    runtime = Runtime(
        dtype=str(model.dtype), dropout=model.dropout, unroll=bool(model.unroll), remat=model.remat
    )
    if config.masked:
        new = _encoder(config, tokenizer, shape["vocab_size"], runtime)
    else:
        runtime = dataclasses.replace(
            runtime,
            per_example_attention=parallel.supports_per_example_attention(mesh),
            flash=_flash(config, mesh),
        )
        layout = BatchLayout(packed_widths=_widths(config))
        new = t5.T5Model(t5.T5Config(**shape), runtime, layout)
    check = lambda x, of: parallel.check_divides(mesh, of, x.shape, "the new backbone")
    parallel.map_with_axes(check, new.abstract_params(), new.logical_axes())
    return new


def _encoder(
    config: PretrainConfig, tokenizer: Tokenizer, rows: int, runtime: Runtime
) -> EncoderModel:
    """A new BERT."""
    if tokenizer.mask_id is None:
        raise UserError(
            f"The tokenizer {config.tokenizer!r} has no mask, which masked_lm needs; name that of "
            "a BERT, or give tokenizer.vocabulary to train one."
        )
    shape = config.shape
    made = EncoderConfig(
        vocab_size=rows,
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        head_dim=shape.d_model // shape.num_heads,
        d_ff=shape.d_ff,
        num_layers=shape.num_encoder_layers,
        mask_id=tokenizer.mask_id,
        max_positions=shape.max_positions,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
    )
    return EncoderModel(made, runtime, mask_each_target=True)


def _flash(config: PretrainConfig, mesh: Mesh) -> str:
    return flash_attention.kernel(config.model.flash, str(config.model.dtype), mesh)


def _widths(config: PretrainConfig) -> tuple[int, ...]:
    """What lengths of the examples that share a row are rounded up to."""
    return tuple(sorted({-(-config.input_length // n) for n in (8, 4, 2, 1)}))


def _tokenizer_place(
    config: PretrainConfig, folder: Path, begin: Callable[[], None], reporter: Reporter
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
        texts = (
            text for source in config.text for text in _sample_texts(read_documents(source), share)
        )

        def write(path: Path) -> None:
            (train_wordpiece if config.masked else train_tokenizer)(texts, settings, path)
            (path / note.name).write_text(made_of)

        replace_directory(place, write, lambda old: (old / note.name).is_file())

    # only the first process trains it: a second training could give another vocabulary
    if not processes.on_process_zero(is_there):
        begin()
        reporter.say(f"training a tokenizer of {settings.vocabulary} rows")
        processes.on_process_zero(train)
    return str(place)


def _sample_texts(texts: list[str], characters: int) -> list[str]:
    """Evenly spaced ones of the texts, of about so many characters together."""
    step = max(1, -(-sum(map(len, texts)) // max(characters, 1)))
    return texts[::step]


def _new(model: Trained, seed: int, mesh: Mesh) -> Params:
    """Random weights, each part of them made where it belongs."""
    key = jax.random.key(seed)
    if mesh.size == 1:
        return _init(model, key)
    specs = parallel.specs_of(mesh, model.abstract_params(), model.logical_axes())
    place = parallel.named_shardings(mesh, specs)
    return jax.jit(model.init_params, out_shardings=place)(key)


def _state_shapes(
    config: PretrainConfig, model: Trained, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes and dtypes of a state, of which nothing is allocated."""
    bank = np.zeros((1, _virtual_count(config), model.config.d_model), np.float32)
    begin = functools.partial(init_state, PRETRAINING, optimizer)
    return jax.eval_shape(lambda params: begin(params, bank), model.abstract_params())


def _virtual_count(config: PretrainConfig) -> int:
    return config.virtual.count * max(config.virtual.lengths) if config.virtual else 0


def _virtual(
    config: PretrainConfig, params: Params, tokenizer: Tokenizer, d_model: int
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
    params: Params,
    bank: Float[Array, "1 P D"] | None,
    checks: dict[str, list[Batch]],
    model: Trained,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, float]]:
    """Loss in nats a target token, perplexity, share of right tokens and their number by set."""
    scores, sums = {}, _sums(model, mesh)
    put = lambda batch: batch if mesh is None else parallel.put_batch(batch, mesh)
    for name, batches in checks.items():
        parts = [np.asarray(sums(params, bank, put(batch))) for batch in batches]
        nll, correct, count = (float(x) for x in np.sum(parts, axis=0))
        scores[name] = {
            "loss": nll / count,
            "perplexity": math.exp(min(nll / count, 700)),
            "token_accuracy": correct / count,
            "tokens": int(count),
        }
    return scores


@functools.lru_cache(maxsize=8)
def _sums(model: Trained, mesh: Mesh | None) -> Callable[..., Float[Array, " 3"]]:
    """Sums over target tokens of negative log-likelihood, of correct ones, and of ones."""
    placed = model.on(parallel.place_in(mesh))

    def of_rows(params, bank, batch):
        weights = (batch.target_segments > 0).astype(jnp.float32)
        flat = batch._replace(weights=weights, dropout_seed=None)
        _, losses = batch_losses(params, Injection(bank), placed, flat, num_members=1)
        count = jnp.sum(flat.weights)
        return jnp.stack([losses.loss[0] * count, losses.accuracy[0] * count, count])

    everywhere = parallel.shard_over_batch(of_rows, mesh, model.logical_axes(), stacked=True)
    return jax.jit(lambda *args: parallel.psum_over_batch(everywhere(*args), mesh))


def save_model(folder: Path, model: Trained, state: TrainState, tokenizer: str) -> None:
    """Write the backbone as a Hugging Face directory with its tokenizer, complete or not at all.

    All processes call it, and the first one writes.
    """
    weights = processes.fetch_to_zero(state.trainables["model"])
    if jax.process_index() != 0:
        return

    def write(path: Path) -> None:
        rate = model.runtime.dropout
        save_hf(path, model.config, jax.tree.map(lambda x: x[0], weights), dropout=rate)
        if Path(tokenizer).is_dir():
            copy_tokenizer(tokenizer, path)
        else:  # a hub id
            load_tokenizer(tokenizer).save(path)

    replace_directory(folder / "model", write, lambda old: (old / "config.json").is_file())


def fill_in(
    config: PretrainConfig,
    model: Trained,
    params: Params,
    streams: Streams,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> list[dict[str, str]]:
    """What the model writes for a few held-out examples of each text stream, for people to read.

    All processes call it: the weights may be over the devices of all.
    """
    rows: list[tuple[Stream, Example]] = []
    for stream in streams.held_out:
        if not stream.name.startswith("pairs/"):
            rng = random_stream(HELD_OUT_SEED, 1_000_000)
            rows += [(stream, stream.draw(rng)) for _ in range(SAMPLES)]
    if not rows:
        return []
    length = config.target_length if config.masked else None  # else the longest target
    batch = make_batch([e for _, e in rows], input_length=config.input_length, target_length=length)
    inputs, segments, targets, target_segments = (
        parallel.device_put_global(np.asarray(x), parallel.replicated(mesh))
        for x in (batch.inputs, batch.segments, batch.targets, batch.target_segments)
    )
    if isinstance(model, EncoderModel):
        written = _fill_masks(params, model, inputs, segments, targets, target_segments)
    else:
        written = generate.greedy(
            params, Injection(), model, inputs, segments, config.target_length
        )
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


@functools.partial(jax.jit, static_argnums=1)
def _fill_masks(
    params: Params,
    model: EncoderModel,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    targets: Int[Array, "B T"],
    target_segments: Int[Array, "B T"],
) -> Int[Array, "B T"]:
    """The likeliest word at each mask of the inputs, padding after the last."""
    logits = model.logits(params, Injection(), inputs, segments, targets, target_segments)
    return jnp.where(target_segments > 0, jnp.argmax(logits, axis=-1), model.config.pad_id)
