"""What a prompt must be before a server answers with it."""

import numpy as np
import pytest
from helpers import make_backbone

from jaxprompt.config.errors import UserError
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.serving.admission import Admission
from jaxprompt.serving.artefacts import files_of
from jaxprompt.serving.catalogue import Candidate


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(make_backbone(tmp_path_factory.mktemp("backbone"))))


@pytest.fixture(scope="module")
def admission(backbone):
    return Admission(backbone, load_tokenizer(backbone.path).for_table(32))


def candidate(prompt):
    return Candidate("acme/mine", "acme", "0" * 64, files_of(prompt))


def prompt_for(loaded, width=16, **more):
    recorded = {"source": loaded.source, "fingerprint": loaded.fingerprint}
    task = {"name": "mine", "template": "{text}", "labels": ["yes", "no"]}
    metadata = {"backbone": recorded, "task": task} | more
    return Prompt(np.ones((3, width), np.float32), metadata)


def test_a_prompt_of_this_backbone_becomes_a_version(admission, backbone):
    version = admission(candidate(prompt_for(backbone)))
    assert (version.name, version.tenant, version.length) == ("acme/mine", "acme", 3)
    assert version.task.name == "mine" and version.labels.labels == ("yes", "no")
    assert version.attention == "causal" and version.number == 0
    tuned = {"config": {"model": {"attention": "prefix"}}}
    assert admission(candidate(prompt_for(backbone, **tuned))).attention == "prefix"


def test_a_prompt_without_a_task_of_its_own_has_no_labels(admission, backbone):
    several = [{"name": name, "template": "{text}", "labels": ["yes", "no"]} for name in "ab"]
    for prompt in (
        Prompt(np.ones((2, 16), np.float32), {}),
        prompt_for(backbone, mixture=several),
    ):
        version = admission(candidate(prompt))
        assert version.task is None and version.labels is None


def test_a_prompt_that_does_not_fit_is_refused_with_the_reason(admission, backbone):
    other = {"source": "t5-other", "fingerprint": "0123456789abcdef"}
    same = {"name": "mine", "template": "{text}", "labels": ["zzz", "qqq"]}
    for prompt, message in [
        (prompt_for(backbone, width=8), "vectors of 8 numbers"),
        (prompt_for(backbone, backbone=other), "other weights"),
        (prompt_for(backbone, task=same), "same tokens|no token"),
        (prompt_for(backbone, task={"name": "x", "template": 3}), "template"),
    ]:
        with pytest.raises(UserError, match=message):
            admission(candidate(prompt))

    def full(version):
        raise UserError(f"The prompt has {version.length} vectors; start with --length.")

    with pytest.raises(UserError, match="3 vectors"):
        admission._replace(check_fits=full)(candidate(prompt_for(backbone)))
    anything = admission._replace(any_backbone=True)
    assert anything(candidate(prompt_for(backbone, backbone=other))).length == 3
