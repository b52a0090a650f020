"""The serving engine: rows of any prompts together are what each is alone, and nothing compiles."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers_step import V

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.data.batches import Example, make_batch
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.inference.engine import Program, make_engine, num_compilations
from jaxprompt.inference.generate import greedy
from jaxprompt.inference.rank import label_log_likelihoods
from jaxprompt.inference.score import log_likelihoods
from jaxprompt.methods.registry import method_of
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.label_tree import label_trees
from jaxprompt.models.t5.t5 import T5Config, T5Model
from jaxprompt.serving.compute import Compute
from jaxprompt.serving.grid import Grid, Limits
from jaxprompt.serving.slots import SlotBank, slot_shape
from jaxprompt.serving.version import Version, plan_of_ids
from jaxprompt.serving.work import Failed, Sampling, Work

SMALL = {"vocab_size": V, "d_model": 16, "d_ff": 24, "head_dim": 4}
MODELS = {
    "t5": T5Model(T5Config(**SMALL, num_heads=3, num_encoder_layers=2, num_decoder_layers=2)),
    "decoder": DecoderModel(
        DecoderConfig(**SMALL, num_heads=4, num_kv_heads=2, num_layers=2, eos_id=1)
    ),
}
PLANS = (
    plan_of_ids("ab", [[5, 1], [5, 7, 1]]),
    plan_of_ids("cd", [[9, 1], [10, 1]], length_normalized=True),
    plan_of_ids("efg", [[3, 4, 5, 1], [3, 8, 1], [11, 1]]),
    plan_of_ids("hi", [[12, 13, 1], [12, 14, 1]]),
)
METHODS = {
    "prompt-tuning": {},
    "prompt+lora": {"lora": {"rank": 2, "targets": "all"}},
    "prefix-tuning": {"prefix": {"length": 3, "mlp": None}},
    "ia3": {},
    "parallel": {"adapter": {"after": ["attention", "mlp"], "width": 3}},
}
ATTENTIONS = ("causal", "prefix", "prompt")
GRIDS = {
    "rank": Grid((4,), (16,), (8,)),
    "score": Grid((4,), (16,), (8,)),
    "generate": Grid((4,), (16,), (8,), scored=False),
    "features": Grid((4,), (16,)),
}


@functools.cache
def params(family):
    return jax.jit(MODELS[family].init_params)(jax.random.key(0))


def prompt_of(family, method, length=4, seed=0):
    """A prompt of a method, with random numbers added to all that it trains."""
    config = RunConfig(
        task="boolq", output="x", method=method, prompt={"length": length}, **METHODS[method]
    )
    made, rng = method_of(config), np.random.default_rng(seed)
    start = rng.normal(size=(1, length if made.uses_prompt else 0, 16)).astype(np.float32)
    noise = lambda x: np.asarray(x + rng.normal(size=x.shape, scale=0.3), np.float32)
    trained = jax.tree.map(noise, made.init(params(family), start, config.prompt, 0))
    injection = jax.tree.map(lambda x: np.asarray(x)[0], made.inject(trained, params(family)))
    vectors = injection.embeddings
    vectors = np.zeros((0, 16), np.float32) if vectors is None else vectors
    return Prompt(vectors, {}, injection.layers)


def version_of(prompt, name="p", plan=None, attention="causal"):
    return Version(name, None, "0" * 64, 1, prompt, attention=attention, labels=plan)


@functools.cache
def server(family):
    """An engine with all kinds of work, and versions of several methods and lengths."""
    versions = [
        version_of(prompt_of(family, method, length, seed), method, PLANS[seed % 4])
        for seed, (method, length) in enumerate(
            [("prompt-tuning", 2), ("prompt+lora", 4), ("prefix-tuning", 4), ("ia3", 4),
             ("parallel", 4), ("prompt-tuning", 3)]
        )
    ]  # fmt: skip
    engine = compute_of(family, versions)
    engine.warm()
    return engine, versions


def compute_of(family, versions, slots=4, kinds=None, attentions=("causal",)):
    """An engine with slots for three versions."""
    model = MODELS[family]
    grids = GRIDS | ({"echo": Grid((4,), (16,), (16,))} if family == "decoder" else {})
    grids = {kind: grid for kind, grid in grids.items() if kinds is None or kind in kinds}
    bank = SlotBank(slot_shape([each.prompt for each in versions], 16), slots)
    backbone = Backbone(model, params(family), "tiny", "", "tiny")
    return Compute(backbone, SimpleNamespace(eos_id=1), bank, Limits(grids, attentions, chunk=3))


def text(seed, count=5):
    return np.random.default_rng(seed).integers(3, V, count).astype(np.int32)


def work(kind, version, seed, **fields):
    length = 0 if version is None else version.length
    inputs = np.concatenate([virtual_ids(V, length), text(seed, 3 + seed % 5)])
    targets = np.append(text(seed + 50, 2), 1).astype(np.int32)
    labels = version.labels if version is not None else PLANS[0]
    return Work(kind, version, Example(inputs, targets), labels=labels, **fields)


def alone(family, version):
    """The engine of ``predict``, with one prompt."""
    return make_engine(params(family), version.prompt.injection, MODELS[family])


def predicted(engine, row):
    """The scores of a row's labels as ``predict`` finds them."""
    labels = np.full((len(row.labels.labels), 4), -1, np.int32)
    for label, edges in zip(labels, row.labels.edges, strict=True):
        label[: (edges >= 0).sum()] = row.labels.tokens[edges[edges >= 0]]
    program = Program(label_log_likelihoods, operands=(label_trees(labels),))
    [found] = engine.run(program, [row.example], batch_size=4)
    return found / (labels >= 0).sum(axis=1) if row.labels.length_normalized else found


def mixed(versions):
    return [work("rank", version, seed) for seed, version in enumerate([*versions, versions[0]])]


@pytest.mark.parametrize("family", MODELS)
def test_labels_of_mixed_prompts_have_the_scores_that_predict_gives(family):
    engine, versions = server(family)
    works = mixed(versions)
    for row, outcome in zip(works, engine.run(works), strict=True):
        wanted = predicted(alone(family, row.version), row)
        np.testing.assert_allclose(outcome.scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_a_row_has_the_same_bits_alone_and_in_any_mix_though_slots_are_few(family):
    engine, versions = server(family)
    before = engine.bank.evictions
    works = mixed(versions)
    together = engine.run(works)
    for row, outcome in zip(works, together, strict=True):
        [lone] = engine.run([row])
        np.testing.assert_array_equal(lone.scores, outcome.scores)
    assert engine.bank.evictions > before and engine.num_compilations == 0


@pytest.mark.parametrize("family", MODELS)
def test_scores_of_targets_are_those_of_the_score_command(family):
    engine, versions = server(family)
    works = [work("score", version, seed) for seed, version in enumerate(versions)]
    for row, outcome in zip(works, engine.run(works), strict=True):
        [wanted] = log_likelihoods(alone(family, row.version), [row.example], batch_size=4)
        assert outcome.log_likelihood == pytest.approx(float(wanted), abs=1e-5)
        assert outcome.tokens == 3


@pytest.mark.parametrize("family", MODELS)
def test_chunks_of_greedy_answers_are_those_of_one_loop_and_survive_eviction(family):
    engine, versions = server(family)
    versions = versions[:3]
    limits = [8, 5, 8]
    works = [
        work("generate", version, seed, settings=Sampling(limit))
        for seed, (version, limit) in enumerate(zip(versions, limits, strict=True))
    ]
    found, finishes = [[] for _ in works], [None] * len(works)
    for chunks in engine.generate(works):
        for row, chunk in enumerate(chunks):
            if chunk is not None:
                found[row] += chunk.tokens.ids.tolist()
                finishes[row] = chunk.finish
        # others take all slots while the answers go on
        engine.run(mixed(server(family)[1][3:]))
    for row, ids, finish, limit in zip(works, found, finishes, limits, strict=True):
        batch = make_batch([row.example._replace(targets=np.zeros(0, np.int32))], input_length=16)
        model = MODELS[family]
        wanted = greedy(params(family), row.version.prompt.injection, model,
                        batch.inputs, batch.segments, 8)[0].tolist()  # fmt: skip
        wanted = wanted[: wanted.index(1)] if 1 in wanted else wanted
        assert ids == wanted[:limit]
        assert finish == ("stop" if len(ids) < limit else "length")


def test_sampled_tokens_depend_on_the_rows_own_seed_alone():
    engine, versions = server("t5")
    make = lambda seed, temperature=1.0, top_p=1.0: work(
        "generate", versions[0], 1, settings=Sampling(8, temperature, top_p, seed, ignore_eos=True)
    )

    def answers(works):
        parts = [[chunk.tokens.ids for chunk in row if chunk is not None]
                 for row in zip(*engine.generate(works), strict=True)]  # fmt: skip
        return [np.concatenate(row).tolist() for row in parts]

    first, second, narrow, cold = answers([make(7), make(8), make(7, 1.0, 1e-6), make(7, 0.0)])
    assert answers([make(8), make(7)]) == [second, first]
    assert first != second and len(first) == 8
    assert narrow == cold  # only the likeliest token is left


def test_a_cancelled_answer_ends_and_others_go_on():
    engine, versions = server("t5")
    settings = Sampling(8, ignore_eos=True)
    works = [work("generate", versions[0], seed, settings=settings) for seed in range(2)]
    chunks = engine.generate(works)
    next(chunks)
    works[0].cancelled = True
    rest = list(chunks)
    assert rest[0][0].finish == "cancelled" and not len(rest[0][0].tokens.ids)
    assert sum(len(each[1].tokens.ids) for each in rest) == 7 and rest[-1][1].finish == "length"


@pytest.mark.parametrize("family", MODELS)
def test_a_prompt_that_is_not_finite_fails_its_own_rows_alone(family):
    engine, versions = server(family)
    prompt = versions[1].prompt
    nan = version_of(
        prompt._replace(
            vectors=prompt.vectors * np.nan,
            layers=jax.tree.map(lambda x: x * np.float32(np.nan), prompt.layers),
        ),
        plan=PLANS[0],
    )
    good = [work("rank", versions[0], 1), work("rank", versions[2], 2)]
    first, bad, second = engine.run([good[0], work("rank", nan, 0), good[1]])
    assert isinstance(bad, Failed) and "not finite" in bad.message
    for row, outcome in zip(good, (first, second), strict=True):
        np.testing.assert_array_equal(engine.run([row])[0].scores, outcome.scores)


@pytest.mark.parametrize("family", MODELS)
def test_whatever_is_asked_after_the_start_compiles_nothing(family):
    engine, versions = server(family)
    before = num_compilations()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    new = version_of(prompt_of_shape(versions[1].prompt), plan=PLANS[2])
    works = [work("rank", each, seed) for seed, each in enumerate([None, new, *versions])]
    engine.run(works)
    engine.run([work("score", new, 0)])
    engine.run([work("features", None, 0)])
    list(engine.generate([work("generate", new, 0, settings=Sampling(5, 0.7, 0.9))]))
    assert not compiled and num_compilations() == before and engine.num_compilations == 0
    jax.jit(lambda x: x + 1.2345)(np.ones(3))
    assert compiled  # the listener hears


def prompt_of_shape(prompt):
    return prompt._replace(vectors=prompt.vectors[:3] + 1)


def test_features_are_those_of_the_bare_backbone():
    engine, versions = server("t5")
    rows = [work("features", None, seed) for seed in range(2)]
    found = engine.run(rows)
    model = MODELS["t5"]
    for row, outcome in zip(rows, found, strict=True):
        batch = make_batch([row.example], input_length=16)
        hidden = model.hidden(params("t5"), batch.inputs, batch.segments)[0]
        wanted = np.asarray(hidden)[batch.segments[0] > 0].mean(axis=0)
        np.testing.assert_allclose(outcome.vector, wanted, rtol=1e-5, atol=1e-5)


def test_the_tokens_of_a_text_have_the_likelihoods_of_targets():
    engine, versions = server("decoder")
    [bare, prompted] = engine.run([work("echo", None, 4), work("echo", versions[0], 4)])
    for row, outcome in ((work("echo", None, 4), bare), (work("echo", versions[0], 4), prompted)):
        tokens = outcome.tokens
        lead = 1 if row.version is None else row.version.length
        ids = row.example.inputs[lead:]
        example = Example(row.example.inputs[:lead], ids)
        engine_of = alone("decoder", row.version or version_of(Prompt(np.zeros((0, 16)), {})))
        [wanted] = log_likelihoods(engine_of, [example], batch_size=1)
        found = tokens.log_probs[:-1]
        assert np.isnan(found[0]) == (row.version is None)
        assert np.nansum(found) == pytest.approx(float(wanted), abs=1e-5)
        assert tokens.ids[-1] == tokens.top_ids[-1, 0] and len(tokens.ids) == len(tokens.top_ids)
        assert tokens.log_probs[-1] == tokens.top_log_probs[-1, 0]


def test_work_that_can_never_be_answered_is_refused_with_the_limit():
    engine, versions = server("t5")
    fine = work("rank", versions[0], 0)
    engine.check(fine)
    assert engine.lane(fine) == engine.lane(work("rank", versions[1], 0))
    assert engine.cost(fine) == 24
    foreign = fine.example._replace(inputs=np.append(fine.example.inputs, V + 2).astype(np.int32))
    bare = fine.example._replace(inputs=text(1))
    long = bare._replace(inputs=np.full(40, 5, np.int32))
    for bad, message in (
        (Work("rank", versions[0], foreign, labels=PLANS[0]), "outside of the vocabulary"),
        (Work("rank", None, long, labels=PLANS[0]), "--max-input-length"),
        (Work("echo", None, bare), "/v1/score"),
        (Work("rank", None, bare), "no labels"),
        (Work("generate", None, bare, Sampling(9)), "--max-new-tokens"),
    ):
        with pytest.raises(UserError, match=message):
            engine.check(bad)


def test_a_version_that_no_slot_can_hold_is_refused_with_the_option():
    engine, versions = server("t5")
    for each in versions:
        engine.check_fits(each)
    longer = version_of(prompt_of("t5", "prompt-tuning", 9))
    with pytest.raises(UserError, match="--max-prompt-length 9"):
        engine.check_fits(longer)
    wide = [[*map(int, text(seed, 4)), 1] for seed in range(9)]
    many = version_of(versions[0].prompt, plan=plan_of_ids("abcdefghi", wide))
    with pytest.raises(UserError, match="--max-label-nodes"):
        engine.check_fits(many)
    lora = versions[1].prompt
    lora = lora._replace(vectors=lora.vectors[:2])
    with pytest.raises(UserError, match="no room"):
        compute_of("t5", versions[:1], kinds=()).check_fits(version_of(lora))


def test_pinned_versions_stay_and_the_least_recently_used_makes_room():
    versions = [version_of(Prompt(np.full((2, 16), i, np.float32), {})) for i in range(5)]
    bank = SlotBank(slot_shape([each.prompt for each in versions], 16), slots=4)
    bank.pin(versions[0])
    bank.place(versions[:3])
    bank.place([versions[1]])
    slots = bank.place([versions[3], None, versions[1]])
    assert not bank.holds(versions[2]) and bank.holds(versions[0]) and slots[1] == 0
    table = np.asarray(bank.injection.embeddings)
    assert table[slots[0], 0, 0] == 3 and table[slots[2], 0, 0] == 1 and not table[0].any()
    with pytest.raises(UserError, match="--slots"):
        bank.pin(versions[1])
        bank.pin(versions[3])


def test_each_attention_has_a_lane_whose_rows_are_read_as_it_says():
    """A decoder-only prompt may see itself, or all of the input, and is answered like that."""
    plain = [prompt_of("decoder", "prompt-tuning", length, length) for length in (2, 4)]
    versions = [
        version_of(prompt, plan=PLANS[at], attention=attention)
        for attention in ATTENTIONS
        for at, prompt in enumerate(plain)
    ]
    engine = compute_of("decoder", versions, kinds=("rank",), attentions=ATTENTIONS)
    assert len({engine.lane(work("rank", version, 0)) for version in versions}) == 3
    found = {}
    for attention in ATTENTIONS:
        model = registry.with_attention(MODELS["decoder"], attention)
        works = [work("rank", each, 1) for each in versions if each.attention == attention]
        for row, outcome in zip(works, engine.run(works), strict=True):
            rival = make_engine(params("decoder"), row.version.prompt.injection, model)
            wanted = predicted(rival, row)
            np.testing.assert_allclose(outcome.scores, wanted, rtol=1e-5, atol=1e-5)
            found[attention] = outcome.scores
    assert not np.allclose(found["causal"], found["prompt"], atol=1e-4)
    assert not np.allclose(found["causal"], found["prefix"], atol=1e-4)
