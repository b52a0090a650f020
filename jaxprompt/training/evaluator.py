"""Scores of trials: their answers to rows of their task, and the task's metrics of these."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.evaluation.metrics import majority
from jaxprompt.evaluation.metrics import measure as measure_answers
from jaxprompt.inference.engine import make_engine
from jaxprompt.inference.predict import check_finite_scores, predict_per_member
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection, some_members
from jaxprompt.runtime.signals import Signals
from jaxprompt.training.datasets import Split, TaskDataset, mixture_metrics
from jaxprompt.training.metric_log import Metrics
from jaxprompt.training.trial import Trial


class Evaluator(NamedTuple):
    """Answers rows with a backbone and prompts. It writes nothing."""

    model: registry.Model
    mesh: Mesh
    tokenizer: Tokenizer
    batch_size: int
    signals: Signals  # one that comes during an evaluation takes effect at once

    def validate(
        self,
        params: registry.Params,
        injection: Injection,
        trials: Sequence[Trial],
    ) -> list[Metrics]:
        """The validation metrics of trials, by slot. NaN where a model's scores are not finite.

        Args:
            injection: of the trials, by slot.
        """
        datasets = list({id(trial.dataset): trial.dataset for trial in trials}.values())
        scores: dict[int, Metrics] = {}
        for dataset in datasets:
            slots = [slot for slot, trial in enumerate(trials) if trial.dataset is dataset]
            # with a single dataset, every prompt has the length of the bank
            part = injection
            if len(datasets) > 1:
                part = some_members(injection, np.array(slots), dataset.length)
            each = self._validate(params, part, dataset)
            scores |= zip(slots, each, strict=True)
        return [scores[slot] for slot in range(len(trials))]

    def _validate(
        self, params: registry.Params, injection: Injection, dataset: TaskDataset
    ) -> list[Metrics]:
        """The validation metrics of every member of the injection."""
        measured = {
            part.task.name: self.measure(params, injection, part.task, part.validation)
            for part in dataset.tasks()
        }
        if not dataset.parts:
            return measured[dataset.task.name]
        members = zip(*measured.values(), strict=True)
        return [mixture_metrics(dict(zip(measured, each, strict=True))) for each in members]

    def test(
        self, params: registry.Params, injection: Injection, dataset: TaskDataset, source: str
    ) -> Metrics:
        """The metrics on test rows of an injection of one member, or of the model as it is.

        Raises:
            UserError: scores of some rows are not finite; it names ``source``.
        """
        measured = {
            part.task.name: self.measure_one(params, injection, part.task, part.test, source)
            for part in dataset.tasks()
            if part.test is not None
        }
        return mixture_metrics(measured) if dataset.parts else measured[dataset.task.name]

    def measure(
        self,
        params: registry.Params,
        injection: Injection,
        task: TaskConfig,
        split: Split,
    ) -> list[Metrics]:
        """The metrics of every member of the injection on a split."""
        return [
            dict.fromkeys(task.metrics, math.nan) if non_finite_rows else measured
            for measured, non_finite_rows in self._measured(params, injection, task, split)
        ]

    def measure_one(
        self,
        params: registry.Params,
        injection: Injection,
        task: TaskConfig,
        split: Split,
        source: str,
    ) -> Metrics:
        """The metrics of an injection of one member, or of the model as it is.

        Raises:
            UserError: scores of some rows are not finite; it names ``source``.
        """
        [(measured, non_finite_rows)] = self._measured(params, injection, task, split)
        check_finite_scores(non_finite_rows, len(split.examples), source)
        return measured

    def _measured(self, params, injection, task: TaskConfig, split: Split):
        """Pairs of metrics and the numbers of the rows whose scores are not finite."""
        engine = make_engine(params, injection, self.model, self.mesh)
        with self.signals.interruptible():
            answers = predict_per_member(
                engine, task, split.examples, self.tokenizer, batch_size=self.batch_size
            )
        return [
            (
                {}
                if each.non_finite_rows
                else measure_answers(task, each.predictions, split.references),
                each.non_finite_rows,
            )
            for each in answers
        ]

    def baselines(
        self, params: registry.Params, task: TaskConfig, validation: Split, source: str
    ) -> tuple[float, float]:
        """The task's first metric of the untuned backbone, and of always giving one label."""
        metric = task.metrics[0]
        untuned = self.measure_one(params, Injection(), task, validation, source)[metric]
        return untuned, majority(metric, validation.references, task.labels)
