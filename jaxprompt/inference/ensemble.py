"""Several prompts for one task, answered in the same batches, and their joint predictions.

Lester et al. 2021, section 6: the prompts are one bank on one frozen backbone.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError, shown
from jaxprompt.inference.engine import Engine
from jaxprompt.inference.session import Session, TaskLike, prompt_task
from jaxprompt.methods.layers import joined


def vote(predictions: Sequence[list[str]]) -> list[str]:
    """For each row the answer that most of N prompts give; in a tie, that of the first prompt.

    ``predictions``: [N][rows]. Majority vote of five prompts: Lester et al. 2021, section 6.
    """
    return [
        # most_common keeps the order of the prompts, so the first one wins a tie
        collections.Counter(answers[i] for answers in predictions).most_common(1)[0][0]
        for i in range(len(predictions[0]))
    ]


def likeliest(scores: Float[np.ndarray, "N n C"], labels: Sequence[str]) -> list[str]:
    """For each row the label of the highest mean probability over N prompts.

    ``scores`` are log-likelihoods; a prompt's probabilities of the labels add up to 1.
    """
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return [labels[int(i)] for i in shares.mean(axis=0).argmax(axis=-1)]


def ensemble_engine(sessions: Sequence[Session]) -> Engine:
    """One engine with what was tuned for all sessions as its members, in order.

    Methods may differ. Raises UserError unless all fit one backbone and have one length.
    """
    prompts = [session.prompt for session in sessions if session.prompt is not None]
    lengths = [len(prompt.vectors) for prompt in prompts]
    if len(prompts) < len(sessions) or len({*lengths}) > 1:
        raise UserError(
            f"Prompts of an ensemble have one length; these have {sorted(lengths)}; leave out "
            "those of another length."
        )
    if len({(id(s.backbone.params), s.backbone.model) for s in sessions}) > 1:
        raise UserError(
            "Prompts of an ensemble share one loaded backbone and its attention; open all sessions "
            "with the same Backbone, and leave out prompts tuned with another model.attention."
        )
    injection = joined([prompt.injection for prompt in prompts])
    return sessions[0].engine._replace(injection=injection)


# keys of a task that say which rows there are and what is measured, not how a row is written
_NOT_IN_INPUTS = {"name", "source", "train", "validation", "test", "metrics", "class_labels"}


def check_one_form(sessions: Sequence[Session], task: TaskLike) -> None:
    """Raise a UserError unless all prompts read the same text, in the same ids."""
    tasks = [prompt_task(session.prompt, task) for session in sessions]
    names = {task.name for task in tasks}
    if len(names) > 1:
        raise UserError(
            f"Prompts of an ensemble are for one task; these are for {', '.join(sorted(names))}; "
            "leave out the others, or name the task with --task."
        )
    first, *others = (task.model_dump(exclude=_NOT_IN_INPUTS) for task in tasks)
    for number, other in enumerate(others, 2):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"Prompts of an ensemble are asked in one form, and task.{key} is "
                    f"{shown(value)} to prompt 1 and {shown(other[key])} to prompt {number}; leave "
                    "one of them out, or give the form for all with --task."
                )
    tokenizers = {id(session.tokenizer): session.tokenizer for session in sessions}
    if len(tokenizers) > 1 and len({words.identity() for words in tokenizers.values()}) > 1:
        raise UserError(
            "Prompts of an ensemble are asked in one tokenizer's ids, and these have different "
            "tokenizers; leave out those of another, or name one for all with --tokenizer."
        )
