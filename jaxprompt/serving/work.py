"""What the engine is asked and what it answers: one piece of work is one row of a batch.

Nothing here touches JAX. Whoever makes work out of requests, queues it, or stands in for the engine
in a test, needs only these types.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from jaxprompt.data.batches import Example
from jaxprompt.serving.version import LabelPlan, Version

# rank: the likelihood of each label. score: that of the example's target. generate: an answer.
# echo: the likelihood of each token of the input (decoder-only). features: what the bare backbone
# makes of a text.
Kind = Literal["rank", "score", "generate", "echo", "features"]

TOP = 5  # the likeliest tokens that are told of each position


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is generated. A row's tokens depend on its own settings and seed alone."""

    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0  # only of the likeliest tokens that have this probability together
    seed: int = 0
    ignore_eos: bool = False  # go on to max_tokens


@dataclasses.dataclass(eq=False)
class Work:
    """One row. Compared by identity.

    ``cancelled`` may be set at any time, from any thread: work that waits is then dropped, and an
    answer that is being generated ends with its next chunk. All else stays as it is.
    """

    kind: Kind
    version: Version | None  # None: the bare backbone
    # ids of text, and V + p for virtual token p of the version (V rows of the embedding table);
    # the engine puts the place of the version's slot in
    example: Example
    settings: Sampling | None = None  # of "generate"
    labels: LabelPlan | None = None  # of "rank": nearly always those of the version
    key: str = ""  # of the client: keys get equal shares
    deadline: float | None = None  # by time.monotonic(): after it nobody waits for the answer
    cancelled: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """The score of each label in nats, in the order of the plan: see ``LabelPlan.scores``."""

    scores: Float[np.ndarray, " C"]


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """log p(target | input) of the example's target, in nats, and the number of its tokens."""

    log_likelihood: float
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens with their likelihoods, and the likeliest tokens of each position, best first."""

    ids: Int[np.ndarray, " t"]
    log_probs: Float[np.ndarray, " t"]  # nats; NaN for a first token that nothing is before
    top_ids: Int[np.ndarray, "t top"]
    top_log_probs: Float[np.ndarray, "t top"]


@dataclasses.dataclass(frozen=True, eq=False)
class Echoed:
    """The tokens of the input without virtual ones, and one more: the likeliest that follows."""

    tokens: Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Featured:
    """The mean hidden state of a text in the bare backbone."""

    vector: Float[np.ndarray, " D"]


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """The next tokens of an answer, without EOS, and why it ends with them; None: it goes on.

    stop: EOS. length: ``max_tokens``. cancelled: ``Work.cancelled`` was set.
    """

    tokens: Tokens
    finish: Literal["stop", "length", "cancelled"] | None


@dataclasses.dataclass(frozen=True)
class Failed:
    """The row has no answer, and other rows of its batch do. ``message`` is one sentence."""

    message: str


Outcome = Ranked | Scored | Echoed | Featured | Chunk | Failed


@runtime_checkable
class Engine(Protocol):
    """What the batcher needs of ``compute.Compute``. One thread calls it, after ``warm``.

    ``check``, ``lane`` and ``cost`` read nothing that changes, so any thread may call them.
    """

    def check(self, work: Work) -> None:
        """Refuse work that can never be answered. Raises UserError, with the limit and the fix."""
        ...

    def lane(self, work: Work) -> Hashable:
        """Rows of one lane may share a batch. ``lane[0]`` is the kind of the work."""
        ...

    def cost(self, work: Work) -> int:
        """Tokens of the row as the smallest program that fits it pads them."""
        ...

    def run(self, batch: Sequence[Work]) -> Sequence[Outcome]:
        """The outcome of each row; of any kind but "generate", all of one lane."""
        ...

    def generate(self, batch: Sequence[Work]) -> Iterator[Sequence[Chunk | Failed | None]]:
        """The next chunk of each row, again and again until all rows have ended.

        None stands for a row that has ended before. Nothing is computed between two chunks, so
        other batches may run there; to drop the iterator is to end all rows.
        """
        ...
