"""What a prompt is: its vectors beside the backbone's words, and its changes of the layers."""

from typing import TypedDict

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.registry import class_words
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.evaluation.analysis import PromptReport, summarize
from jaxprompt.methods.contents import ChangeReport, changes_in
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.checkpoints.load import Backbone


class ChangesAlone(TypedDict):
    """What ``inspect`` says of a prompt without virtual tokens."""

    length: int
    changes: list[ChangeReport]


class Inspection(PromptReport, total=False):
    """What ``inspect`` says of a prompt with virtual tokens."""

    changes: list[ChangeReport]  # of the layers, where there are any


def inspect_prompt(
    prompt: Prompt, backbone: Backbone, tokenizer: Tokenizer, nearest: int = 5
) -> Inspection | ChangesAlone:
    """Nearest words, norms and similarities of the vectors, and what changes the layers.

    nearest: words for each vector. Raises UserError where it is no whole number from 1 on.
    """
    changes = changes_in(prompt.layers)
    if not len(prompt.vectors):
        return {"length": 0, "changes": changes}
    if not isinstance(nearest, int | np.integer) or nearest < 1:
        raise UserError(f"nearest is {shown(nearest)}; give a whole number from 1 on.")
    report = summarize(
        prompt.vectors,
        backbone.params["token_embedder"]["embedding"],
        pieces=min(tokenizer.size, backbone.config.vocab_size),
        word=tokenizer.piece,
        count=nearest,
        labels=_label_pieces(prompt, tokenizer),
    )
    return {**report, "changes": changes} if changes else {**report}


def _label_pieces(prompt: Prompt, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of the class labels of the prompt's task, without what ends them."""
    recorded = prompt.metadata.get("task")
    if recorded is None:
        return {}
    task = parse(TaskConfig, recorded, "task.")
    labels = class_words(task)
    ids = tokenizer.encode_targets(labels, task.separator)
    special = set(tokenizer.special_ids)
    return {
        label: [i for i in row if i not in special] for label, row in zip(labels, ids, strict=True)
    }
