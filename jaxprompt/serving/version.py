"""A version of a prompt: what a request is admitted with, and answered by.

A version never changes. To replace a prompt is to make its name point to another version, and to
remove it is to drop the name. A request keeps the version that it was admitted with, so it is
answered by exactly that, whatever happens to the name meanwhile.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import LabelWords, label_words
from jaxprompt.inference.wording import Wording, reworded
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.label_tree import Tree, label_tree


@dataclasses.dataclass(frozen=True, eq=False)
class LabelPlan:
    """The words of C labels as one tree, and the edges of the tree that each word is made of.

    An edge is a token after a node. A tree of n nodes has less than 2 n edges, because each node
    but the first is the end of one, and each word ends with EOS.
    """

    labels: tuple[str, ...]
    tree: Tree  # ids [n], depths [n], visible [n, n]; without padding
    parents: Int[np.ndarray, " e"]  # the node that each edge starts from
    tokens: Int[np.ndarray, " e"]  # the token of each edge
    edges: Int[np.ndarray, "W T"]  # the edges of each word in order; -1 after its end
    length_normalized: bool = False  # scores are means over a word's tokens instead of sums
    words: LabelWords | None = None  # None: each label is its own word

    @property
    def nodes(self) -> int:
        """n, the nodes of the tree."""
        return len(self.tree.ids)

    def scores(self, log_p: Float[np.ndarray, " _"]) -> Float[np.ndarray, " C"]:
        """The score of each label in nats, from log p of each edge; what is after them is ignored.

        The sum over a word's tokens with EOS, or their mean where the task says so, and of these
        what its verbalizer makes of a label's words. They are not calibrated.
        """
        there = self.edges >= 0
        total = np.where(there, log_p[self.edges], 0.0).sum(axis=1, dtype=np.float32)
        if self.length_normalized:
            total = total / there.sum(axis=1, dtype=np.float32)
        return total if self.words is None else self.words.pooled(total)


def in_words(version: "Version", wording: Wording, tokenizer: Tokenizer) -> "Version":
    """The version in the words of one request. It takes the slot of ``version``.

    Raises:
        UserError: the version has no task, or the words cannot be used.
    """
    if version.task is None:
        raise UserError(
            f"The prompt {shown(version.name)} does not say which one task it is for, so there are "
            "no words to change."
        )
    task = reworded(version.task, wording, tokenizer, version.length)
    if task is version.task:
        return version
    plan = label_plan(task, tokenizer)
    return dataclasses.replace(version, task=task, labels=plan, of=version.placed)


def label_plan(task: TaskConfig, tokenizer: Tokenizer) -> LabelPlan | None:
    """The plan of a task's labels; None for a task that is answered by generation."""
    if task.labels is None or task.decoding != "rank":
        return None
    words = label_words(task)
    ids = tokenizer.encode_targets(words.texts, task.separator)
    plan = plan_of_ids(task.labels, ids, length_normalized=task.length_normalized)
    return dataclasses.replace(plan, words=words)


def plan_of_ids(
    labels: Sequence[str], ids: Sequence[Sequence[int]], *, length_normalized: bool = False
) -> LabelPlan:
    """The plan of labels from the ids of each, with EOS.

    Labels [5 1] and [5 7 1] have the nodes (), (5) and (5 7), and the edges () 5, (5) 1, (5) 7 and
    (5 7) 1. The labels are edges 0 1 and 0 2 3.
    """
    width = max(map(len, ids))
    padded = np.array([[*row, *[-1] * (width - len(row))] for row in ids], np.int32)
    tree, nodes = label_tree(padded)
    numbers: dict[tuple[int, int], int] = {}
    edges = np.full_like(padded, -1)
    for label, row in enumerate(padded.tolist()):
        for at, token in enumerate(row):
            if token >= 0:
                edge = int(nodes[label, at]), token
                edges[label, at] = numbers.setdefault(edge, len(numbers))
    parents, tokens = np.array(list(numbers), np.int32).T
    return LabelPlan(tuple(labels), tree, parents, tokens, edges, length_normalized)


@dataclasses.dataclass(frozen=True, eq=False)
class Version:
    """What a name stood for when a request was admitted. Compared by identity."""

    name: str
    tenant: str | None  # None: it is public
    digest: str  # SHA-256 of what the artefact holds, in hexadecimal
    number: int  # grows with each version of the name; none is given twice
    prompt: Prompt  # vectors and layers are NumPy's, in the memory of the host
    task: TaskConfig | None = None  # that it answers; None: its artefact names none
    attention: str = "causal"  # that it was tuned with: causal, prompt or prefix
    labels: LabelPlan | None = None  # of the task; None: it is answered by generation
    of: "Version | None" = None  # this is that one in the words of one request

    @property
    def placed(self) -> "Version":
        """The version whose vectors and changes are in a slot: words change none of them."""
        return self.of or self

    @property
    def length(self) -> int:
        """P, the virtual tokens of the prompt."""
        return len(self.prompt.vectors)
