"""What a prompt must be before a server answers with it: checked once, when it comes in."""

from collections.abc import Callable
from typing import NamedTuple

from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import check_labels
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference.session import attention_of, check_pair, prompt_task
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.serving.artefacts import read_artefact
from jaxprompt.serving.catalogue import Candidate
from jaxprompt.serving.version import Version, label_plan


class Admission(NamedTuple):
    """Makes versions for one backbone; what a ``Catalogue`` asks for."""

    backbone: Backbone
    tokenizer: Tokenizer
    # raises UserError for what the slots of the device cannot hold
    check_fits: Callable[[Version], None] = lambda version: None
    any_backbone: bool = False  # allow other weights of the same shapes

    def __call__(self, candidate: Candidate) -> Version:
        """The version, without its number.

        Raises:
            UserError: the content is damaged, or does not fit the backbone, its tokenizer or the
                device.
        """
        prompt = read_artefact(candidate.files, candidate.name, self.backbone)
        check_pair(prompt, self.backbone, self.any_backbone)
        task = task_of(prompt)
        if task is not None:
            check_labels(task, self.tokenizer)
        version = Version(
            name=candidate.name,
            tenant=candidate.tenant,
            digest=candidate.digest,
            number=0,
            prompt=prompt,
            task=task,
            attention=attention_of(prompt),
            labels=None if task is None else label_plan(task, self.tokenizer),
        )
        self.check_fits(version)
        return version


def task_of(prompt: Prompt) -> TaskConfig | None:
    """The task that the prompt was tuned on; None where it names none, or several."""
    if prompt.metadata.get("task") is None or prompt.metadata.get("mixture"):
        return None
    return prompt_task(prompt, None)
