"""jaxprompt's half of bench_peft.py: answers its requests on standard input.

python scripts/bench/peft/bench_ours.py PROBLEM.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_tools import LABELS, RANK, Row, Start, resident, serve

from jaxprompt.config.methods import LoraConfig
from jaxprompt.config.schema import PromptConfig, TaskConfig, TrainConfig
from jaxprompt.data.batches import Example, with_member
from jaxprompt.data.microbatches import micro_batches
from jaxprompt.data.sampling import with_dropout_seeds
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.inference.engine import Engine, make_engine
from jaxprompt.inference.predict import predict
from jaxprompt.methods.base import Method
from jaxprompt.methods.lora import lora
from jaxprompt.methods.prompt import PROMPT_TUNING
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.injection import some_members
from jaxprompt.runtime import devices, parallel
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import init_state, make_train_step

Job = dict[str, Any]
DEPTH = max(map(len, LABELS.values()))


def take_step(step, state, params, examples, rows, widths, mesh):
    """One optimizer step on a batch in micro-batches of ``rows``, and the shapes of its inputs."""
    batches = micro_batches(
        examples,
        rows=rows,
        target_length=DEPTH,
        layout=widths,
        devices=parallel.num_batch_shards(mesh),
    )
    state, losses = step(state, params, parallel.put_batch(batches, mesh))
    return state, losses, [batch.inputs.shape for batch in batches]


class Words:
    """The part of a tokenizer that ranking labels needs."""

    def encode_targets(self, labels, separator=""):
        return [LABELS[label] for label in labels]


class Ours:
    """Runs jobs; what they share (a loaded backbone, a compiled step) is kept."""

    def __init__(self, problem: str):
        # the cores that all jobs' rows go over, as in the command
        devices.start([min(map(int, json.loads(Path(problem).read_text())["batches"]))])
        jnp.zeros(3).block_until_ready()  # the backend's own memory is not the work's
        self.mesh = parallel.make_mesh()
        self.problem = problem
        self.given: Start | None = None
        self.backbones: dict[tuple[str, float, str | None], Backbone] = {}
        self.steps: dict[tuple[Any, ...], Any] = {}

    def facts(self) -> dict[str, Any]:
        import jaxprompt

        kinds = [device.device_kind for device in jax.devices()]
        found = {"versions": {"jaxprompt": jaxprompt.__version__, "jax": jax.__version__}}
        # of a GPU's memory nothing is used yet
        return found | ({} if jax.default_backend() == "cpu" else {"devices": kinds, "bare": 0})

    def start(self) -> Start:
        self.given = self.given or Start.read(self.problem)
        return self.given

    def backbone(self, job: Job) -> Backbone:
        key = job["dtype"], job["dropout"], job["attention"]
        if key not in self.backbones:
            self.backbones[key] = load_backbone(
                self.start().weights, dtype=job["dtype"], dropout=job["dropout"],
                mesh=self.mesh, flash=job["attention"] == "flash",
            )  # fmt: skip
        return self.backbones[key]

    def method(self) -> Method:
        whole = LoraConfig(rank=RANK, alpha=RANK)
        return lora(whole) if self.start().method == "lora" else PROMPT_TUNING

    def vectors(self, backbone: Backbone, members: int = 1) -> np.ndarray:
        """What each member starts from, [K, P, D]; P is 0 for LoRA."""
        table = backbone.params["token_embedder"]["embedding"]
        words = np.asarray(table)[np.array(self.start().start, np.int32)]
        return np.tile(words.astype(np.float32), (members, 1, 1))

    def examples(self, backbone: Backbone, rows: list[Row], member: int = 0) -> list[Example]:
        vocabulary, length = backbone.config.vocab_size, len(self.start().start)
        virtual = virtual_ids(vocabulary, length)
        examples = [
            Example(
                np.concatenate([virtual, np.array(row["inputs"], np.int32)]),
                np.array(row["targets"], np.int32),
            )
            for row in rows
        ]
        return [with_member(example, member, vocabulary, length) for example in examples]

    def train(self, job: Job, steps: int | None = None) -> dict[str, Any]:
        """Every batch once, from the same start: seconds, loss and shapes of each step.

        Each member of a population has rows of its own, which say the same as those of others.
        """
        given, size, backbone = self.start(), str(job["batch_size"]), self.backbone(job)
        members, method = job["members"], self.method()
        settings = TrainConfig(
            steps=1000, optimizer="adamw", learning_rate=given.learning_rate, schedule="constant",
            weight_decay=0.0, z_loss=0.0, clip=1.0,
        )  # fmt: skip
        optimizer, key = (
            per_member(settings),
            (job["dtype"], job["dropout"], job["attention"], size, members),
        )
        rng = np.random.default_rng(0)
        drawn = [
            [
                example
                for member in range(members)
                for example in with_dropout_seeds(self.examples(backbone, rows, member), rng)
            ]
            for rows in given.batches[size]
        ]
        rows = len(given.splits[size][0][0]) if job["micro"] else job["batch_size"]
        lengths = [len(example.inputs) for examples in drawn for example in examples]
        alone = backbone.model
        if members > 1 and given.method == "lora":  # changed layers let no two members share a row
            alone = alone.with_layout(one_member_per_row=True)
        model, many = registry.plan_microbatches(
            alone, lengths, batch_size=job["batch_size"],
            devices=parallel.num_batch_shards(self.mesh), max_widths=4 if job["micro"] else 0,
        )  # fmt: skip
        rows = rows if model is alone else many
        if key not in self.steps:
            self.steps[key] = make_train_step(model, method, optimizer, mesh=self.mesh, z_loss=0.0)
        start = self.vectors(backbone, members)
        state = init_state(method, optimizer, backbone.params, start)
        state = jax.device_put(state, parallel.replicated(self.mesh))
        widths, found = model.layout, {"seconds": [], "losses": [], "shapes": []}
        for examples in drawn[:steps]:
            began = time.perf_counter()
            state, losses, shapes = take_step(
                self.steps[key], state, backbone.params, examples, rows, widths, self.mesh
            )
            found["losses"].append(float(losses.loss[0]))  # waits until the step has ended
            found["seconds"].append(time.perf_counter() - began)
            found["shapes"].append(shapes)
        return found

    def answer(self, job: Job) -> dict[str, Any]:
        """All questions once: seconds and the answers, by the likelihood of each label.

        Members answer in turn: all in the same batches, or each in batches of its own (apart).
        """
        backbone = self.backbone(job)
        task = TaskConfig(
            name="questions", train="-", validation="-", template="{text}", labels=list(LABELS)
        )
        members, method, questions = job["members"], self.method(), self.start().questions
        start = self.vectors(backbone, members)
        trainables = method.init(backbone.params, start, PromptConfig(), 0)
        whole = method.inject(trainables, backbone.params)
        engine = lambda injection: make_engine(
            backbone.params, injection, backbone.model, self.mesh
        )
        answer = lambda engine, some: predict(
            engine, task, some, Words(), batch_size=len(some), pack=True  # type: ignore[arg-type]
        ).predictions  # fmt: skip
        if job["apart"]:
            alone = [engine(some_members(whole, np.array([k]))) for k in range(members)]
            parts = self._parts(job, questions)
            examples = [(alone[k], self.examples(backbone, rows)) for k, rows in parts]
        elif members > 1:
            turns = [self.examples(backbone, [q], i % members)[0] for i, q in enumerate(questions)]
            firsts = range(0, len(turns), job["batch_size"])
            mixed = engine(whole)
            examples = [(mixed, turns[first : first + job["batch_size"]]) for first in firsts]
        else:
            return self._answer_all(job, task, engine(whole), backbone)
        began = time.perf_counter()
        answers = [answer(engine, some) for engine, some in examples]
        return {"seconds": [time.perf_counter() - began], "answers": sum(answers, [])}

    def _parts(self, job: Job, questions: list[Row]) -> list[tuple[int, list[Row]]]:
        """Of each batch the questions of each member."""
        size, members = job["batch_size"], job["members"]
        return [
            (member, questions[first : first + size][member::members])
            for first in range(0, len(questions), size)
            for member in range(members)
        ]

    def _answer_all(
        self, job: Job, task: TaskConfig, engine: Engine, backbone: Backbone
    ) -> dict[str, Any]:
        examples = self.examples(backbone, self.start().questions)
        began = time.perf_counter()
        answers = predict(
            engine, task, examples, Words(), batch_size=job["batch_size"], pack=True  # type: ignore[arg-type]
        )  # fmt: skip
        seconds = time.perf_counter() - began
        return {"seconds": [seconds], "answers": answers.predictions}

    def peak(self) -> dict[str, int]:
        """Bytes: of the GPU where there is one, else of the process."""
        found = jax.devices()[0].memory_stats() or {}
        return {"peak": found.get("peak_bytes_in_use") or resident("VmHWM")}


if __name__ == "__main__":
    serve(lambda: Ours(sys.argv[1]))
