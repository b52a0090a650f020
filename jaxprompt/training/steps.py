"""The compiled step of a run together with what it reads."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from jaxprompt.data.batches import Batch
from jaxprompt.losses import Losses
from jaxprompt.models import registry
from jaxprompt.runtime import parallel
from jaxprompt.training.step import Step, TrainState


class Steps(NamedTuple):
    """The compiled step, the frozen parameters and the batches from the current step on."""

    step: Step
    params: registry.Params
    batches: Iterator[Sequence[Batch]]  # each as its micro-batches
    mesh: Mesh

    def take(self, state: TrainState) -> tuple[TrainState, Losses, Sequence[Batch]]:
        """The next step, which runs on while this returns, and the batch of it."""
        batch = next(self.batches)
        state, losses = self.step(state, self.params, parallel.put_batch(batch, self.mesh))
        return state, losses, batch


def num_tokens(batches: Sequence[Batch]) -> int:
    """Input and target tokens, padding left out."""
    return sum(
        int((batch.segments > 0).sum() + (batch.target_segments > 0).sum()) for batch in batches
    )
