"""A soft verbalizer: label rows in place of the head, in every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_step import P, V, examples

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig, TrainConfig
from jaxprompt.data.batches import Choices, make_batch
from jaxprompt.inference.engine import make_engine
from jaxprompt.inference.predict import predict_per_member
from jaxprompt.inference.rank import features
from jaxprompt.inference.session import prompt_task
from jaxprompt.losses import LabelLoss
from jaxprompt.methods.artefact import load_prompt, save_prompt
from jaxprompt.methods.layers import check_fit, joined
from jaxprompt.methods.registry import method_of
from jaxprompt.methods.soft_verbalizer import _head_rows, rows_of_prototypes
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.encoder.encoder import EncoderModel
from jaxprompt.models.injection import VERBALIZER, Injection, LabelRows
from jaxprompt.models.label_tree import one_token_each
from jaxprompt.models.merge import merge
from jaxprompt.models.t5.t5 import T5Config, T5Model
from jaxprompt.training.label_losses import label_choices
from jaxprompt.training.step import init_state, make_train_step

D, K = 16, 2
SIZES = {"vocab_size": V, "d_model": D, "num_heads": 2, "head_dim": 4, "d_ff": 24}
# the last token of an input of ``examples`` is the mask
MODELS = {
    "t5": T5Model(T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=1)),
    "tied": T5Model(
        T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=1, tied=True, scale_output=True)
    ),
    "decoder": DecoderModel(DecoderConfig(**SIZES, num_kv_heads=2, num_layers=1)),
    "masked": EncoderModel(EncoderConfig(**SIZES, num_layers=1, mask_id=1, max_positions=64)),
}
WORDS = np.array([7, 30, 11])
LABELS = ["a", "b", "c"]
TASK = TaskConfig(name="t", template="{text}", labels=LABELS)


@functools.cache
def weights(family):
    params = jax.jit(MODELS[family].init_params)(jax.random.key(0))
    if "head_bias" in params:  # which starts at 0
        params = {**params, "head_bias": jax.random.normal(jax.random.key(1), (V,))}
    return params


def with_rows(rows, bias=None):
    """The injection of label rows [K, C, D]."""
    bias = np.zeros(rows.shape[:2]) if bias is None else bias
    leaves = LabelRows(jnp.asarray(rows, jnp.float32), jnp.asarray(bias, jnp.float32))
    return Injection(layers={VERBALIZER: leaves})


def random_rows(members, labels=3):
    return np.random.default_rng(members).normal(size=(members, labels, D))


def texts(members=1):
    """Examples of members that have no prompt."""
    return [
        each._replace(inputs=each.inputs[P:])
        for member in range(members)
        for each in examples(3, member)
    ]


def first_logits(family, injection):
    """The logits of the first token of an answer."""
    model, batch = MODELS[family], make_batch(texts(), input_length=16, target_length=4)
    tree = jax.tree.map(lambda x: x[0], one_token_each(1, family == "masked").trees)

    @jax.jit
    def compute(params, injection):
        prefill = model.prefill(params, injection, batch.inputs, batch.segments)
        return model.score_tree(params, injection, prefill, tree)[:, 0]

    return np.asarray(compute(weights(family), injection))


@pytest.mark.parametrize("family", MODELS)
def test_rows_that_are_those_of_words_have_the_logits_of_these_words(family):
    start = _head_rows(weights(family), WORDS)
    injection = with_rows(start.rows[None], start.bias[None])
    of_words = first_logits(family, Injection())[:, WORDS]
    np.testing.assert_allclose(first_logits(family, injection), of_words, rtol=1e-4, atol=1e-5)
    assert np.ptp(of_words) > 0.1


@pytest.mark.parametrize("family", ["t5", "decoder", "masked"])
def test_label_logits_are_rows_times_the_features(family):
    engine = make_engine(weights(family), Injection(), MODELS[family])
    bare = [each._replace(targets=np.zeros(0, np.int32)) for each in texts()]
    found = features(engine, bare, masked=family == "masked", batch_size=4)
    rows, bias = random_rows(1), np.array([[1.0, 0.0, -1.0]])
    logits = first_logits(family, with_rows(rows, bias))
    np.testing.assert_allclose(logits, found @ rows[0].T + bias, rtol=1e-4, atol=1e-4)


def test_prototypes_choose_the_label_of_the_nearest_mean():
    rng = np.random.default_rng(0)
    labels, h = np.arange(60) % 3, rng.normal(size=(60, 5)) * 3 + 1
    rows, bias = rows_of_prototypes(h, labels, 3)
    means = np.stack([h[labels == c].mean(axis=0) for c in range(3)])
    nearest = np.argmin(((h[:, None] - means) ** 2).sum(axis=-1), axis=1)
    assert (np.argmax(h @ np.asarray(rows).T + np.asarray(bias), axis=1) == nearest).all()
    assert len({*nearest.tolist()}) == 3


def test_members_together_score_as_each_alone(tokenizer):
    rows = random_rows(K)
    results = [
        predict_per_member(
            make_engine(weights("t5"), with_rows(each), MODELS["t5"]),
            TASK, texts(), tokenizer, batch_size=4,
        )
        for each in (rows, rows[:1], rows[1:])
    ]  # fmt: skip
    together, *alone = results
    for mine, [lone] in zip(together, alone, strict=True):
        np.testing.assert_allclose(mine.scores, lone.scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(mine.scores).sum(axis=1), 1, rtol=1e-5)
    assert np.abs(together[0].scores - together[1].scores).max() > 0.1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from helpers_data import make_tokenizer

    from jaxprompt.data.tokenizer import load_tokenizer

    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("words")))


def test_members_train_as_each_alone_and_the_rows_learn():
    method = method_of(
        RunConfig(
            task={"name": "t", "template": "{text}", "labels": LABELS, "train": "x"},
            output="x", method="soft-verbalizer",
        )
    )  # fmt: skip
    loss = LabelLoss(one_token_each(3, masked=False))
    step = make_train_step(MODELS["t5"], method, optax.sgd(1.0), loss=loss)
    zeros = np.zeros((0,), np.float32)

    def batch(members):
        rows = [
            each._replace(
                choices=Choices(
                    np.int32((number + each.member) % 3), np.ones(3, bool), zeros, zeros
                )
            )
            for number, each in enumerate(texts(K))
            if each.member in members
        ]
        own = [each._replace(member=members.index(each.member)) for each in rows]
        return make_batch(own, input_length=16, target_length=4)

    def trained(members):
        start = np.zeros((len(members), 0, D), np.float32)
        state = init_state(method, optax.sgd(1.0), weights("t5"), start)
        losses = []
        for _ in range(3):
            state, found = step(state, weights("t5"), [batch(members)])
            losses.append(np.asarray(found.loss))
        return state.trainables, losses

    together, losses = trained([0, 1])
    np.testing.assert_allclose(losses[0], np.log(3), rtol=1e-5)  # rows of zeros know nothing
    assert (losses[-1] < losses[0]).all()
    for member in range(K):
        alone, _ = trained([member])
        for name, leaf in alone.items():
            np.testing.assert_allclose(together[name][member], leaf[0], rtol=1e-4, atol=1e-6)


def test_what_writes_text_refuses_label_rows():
    ones = jnp.ones((1, 2), jnp.int32)
    for family, model in MODELS.items():
        with pytest.raises(UserError, match="writes no text"):
            model.logits(weights(family), with_rows(random_rows(1)), ones, ones, ones, ones)
    with pytest.raises(UserError, match="place of the head"):
        merge(weights("t5"), with_rows(random_rows(1)))


@pytest.mark.parametrize("other", [Injection(), with_rows(random_rows(1, labels=2))])
def test_rows_go_together_only_with_rows_of_as_many_labels(other):
    with pytest.raises(UserError, match="as many labels"):
        joined([with_rows(random_rows(1)), other])


def prompt_of(rows):
    leaves = LabelRows(np.float32(rows), np.zeros(len(rows), np.float32))
    metadata = {"task": TASK.model_dump(), "backbone": {"source": "x"}}
    return Prompt(np.zeros((0, D), np.float32), metadata, {VERBALIZER: leaves})


def test_an_artefact_holds_label_rows_that_fit_its_backbone(tmp_path):
    save_prompt(tmp_path / "p", prompt_of(random_rows(1)[0]))
    found = load_prompt(tmp_path / "p")
    np.testing.assert_array_equal(found.layers[VERBALIZER].rows, np.float32(random_rows(1)[0]))
    assert found.metadata["format"] == 2
    [change] = found.metadata["changes"]
    assert (change["kind"], change["size"], change["numbers"]) == ("label rows", 3, 3 * D + 3)
    check_fit(found.layers, weights("t5"), "x")
    with pytest.raises(UserError, match="verbalizer/rows"):
        check_fit(prompt_of(random_rows(1)[0][:, 1:]).layers, weights("t5"), "x")


def test_labels_without_a_row_are_refused_where_they_are_scored(tokenizer):
    engine = make_engine(weights("t5"), with_rows(random_rows(1)), MODELS["t5"])
    more = TASK.model_copy(update={"labels": [*LABELS, "d"]})
    with pytest.raises(UserError, match="each of its 3 labels, and the task has 4"):
        predict_per_member(engine, more, texts(), tokenizer, batch_size=4)


@pytest.mark.parametrize("change", [{"labels": ["b", "a", "c"]}, {"decoding": "greedy"}])
def test_another_order_of_labels_and_written_answers_are_refused(change):
    prompt = prompt_of(random_rows(1)[0])
    assert prompt_task(prompt, None).labels == LABELS
    with pytest.raises(UserError, match="soft verbalizer for the labels"):
        prompt_task(prompt, change)


def test_members_may_name_labels_by_other_words_and_not_have_other_labels(tokenizer):
    other = TASK.model_copy(update={"verbalizer": {"a": ["good"], "b": ["bad"], "c": ["True"]}})
    choices = label_choices(TrainConfig(), [TASK, other], tokenizer, soft=True)
    assert choices is not None and choices.loss.labels.tokens.tolist() == [[0], [1], [2]]
    [ids] = tokenizer.encode_targets(["bad"])
    [example] = choices.complete([texts()[0]._replace(targets=np.array(ids), member=1)])
    assert example.choices is not None and example.choices.right == 1
    fewer = TASK.model_copy(update={"labels": ["a", "b"]})
    with pytest.raises(UserError, match="only for the same labels"):
        label_choices(TrainConfig(), [TASK, fewer], tokenizer, soft=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"name": "t", "template": "{x}", "train": "x"}}, "fewer than two"),
        ({"train": {"unlikelihood_loss": 1.0}}, "which method=soft-verbalizer replaces"),
    ],
)
def test_what_label_rows_cannot_do_is_said_in_a_sentence(change, message):
    with pytest.raises(Exception, match=message):  # pydantic's, of which the CLI makes a UserError
        method_of(RunConfig.model_validate({
            "task": "boolq", "method": "soft-verbalizer", "output": "x", **change,
        }))  # fmt: skip
