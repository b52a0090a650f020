"""Full fine-tuning and pre-training: what they hold in memory, how it is sharded and kept."""

import gc
import math

import jax
import pytest
from helpers import CONFIG, make_backbone
from helpers import run_config as config
from helpers_data import make_tokenizer
from helpers_text import sentences

from jaxprompt import parallel
from jaxprompt.model import t5
from jaxprompt.training import loop, pretrain
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.logbook import Silent

WEIGHTS = sum(math.prod(x.shape) for x in jax.tree.leaves(t5.abstract_params(CONFIG)))
TUNING = {"optimizer": "adamw", "learning_rate": 1e-2, "steps": 8}
MAKE_MESH = parallel.make_mesh


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


def tuning(backbone, folder, **settings):
    settings["train"] = TUNING | settings.pop("train", {})
    return config(backbone, folder, method="model-tuning", **settings)


def pretraining(folder, **changes):
    return sentences(folder, tokenizer=str(make_tokenizer(folder / "tokenizer")), **changes)


# -- memory ----------------------------------------------------------------------------------------


class Scale(Silent):
    """Weighs what is alive on the devices whenever it hears of something."""

    def __init__(self):
        self.before = self.alive()
        self.most = 0

    @staticmethod
    def alive():
        gc.collect()
        parts = [part.data for x in jax.live_arrays() for part in x.addressable_shards]
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in parts}.values())

    def weigh(self, *_):
        self.most = max(self.most, self.alive() - self.before)

    step = say = weigh


@pytest.fixture
def scale(monkeypatch):
    """Also weighs while a checkpoint is written, when it has been read, and before each answer."""
    monkeypatch.setattr(parallel, "make_mesh", lambda mesh: MAKE_MESH(mesh, jax.devices()[:1]))
    scale = Scale()

    def weighed(owner, name):
        function = getattr(owner, name)

        def around(*args, **kwargs):
            scale.weigh()
            found = function(*args, **kwargs)
            scale.weigh()
            return found

        monkeypatch.setattr(owner, name, around)

    for owner, name in ((Checkpoints, "save"), (Checkpoints, "restore"), (loop, "answer_each"),
                        (loop, "save_tuned"), (pretrain, "held_out_scores"),
                        (pretrain, "fill_in"), (pretrain, "save_model")):  # fmt: skip
        weighed(owner, name)
    return scale


@pytest.mark.parametrize("kind", ["fine-tuning", "pre-training"])
def test_a_run_and_one_that_goes_on_hold_three_copies_of_the_model(backbone, tmp_path, scale, kind):
    """Weights and Adam's two moments."""
    if kind == "fine-tuning":
        runs = [tuning(backbone, tmp_path, train={"steps": n}) for n in (6, 8)]
        test = {"test": runs[0].task["validation"]}
        runs = [run.model_copy(update={"task": run.task | test}) for run in runs]
        size, train = 4 * WEIGHTS, loop.train
    else:
        runs = [pretraining(tmp_path, train={"steps": n}) for n in (6, 8)]
        rows = 128 - CONFIG.vocab_size  # of a tokenizer of fewer words
        size, train = 4 * (WEIGHTS + 2 * rows * CONFIG.d_model), pretrain.pretrain
    for run in runs:
        scale.most = 0
        assert train(run, scale)["steps"] == run.train.steps
        assert 2.9 < scale.most / size < 3.5
