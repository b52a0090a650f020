"""What a step needs, counted from shapes, against what the compiler says that it takes."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxprompt.config import RunConfig, UserError, parse
from jaxprompt.data.pipeline import Batch
from jaxprompt.model import t5, t5_cost
from jaxprompt.model.work import Work
from jaxprompt.prompts.methods import METHODS
from jaxprompt.train import plan
from jaxprompt.train.optimizer import per_prompt
from jaxprompt.train.plan import Layout, layouts, plan_of
from jaxprompt.train.step import init_state, make_train_step

WITHIN = 0.1  # of all bytes that a device needs


def config(**changes):
    task = {"name": "rows", "template": "{text}", "target": "{label}", "labels": ["yes", "no"],
            "train": "a.jsonl", "validation": "a.jsonl"}  # fmt: skip
    values = {"backbone": "google/t5-xxl-lm-adapt", "task": task, "output": "-"}
    return parse(RunConfig, values | changes)


SHAPES = {
    "small": t5.T5Config(
        vocab_size=32_128, d_model=512, num_heads=6, head_dim=64, d_ff=1024,
        num_encoder_layers=8, num_decoder_layers=8,
    ),
    "wide": t5.T5Config(
        vocab_size=4096, d_model=768, num_heads=12, head_dim=64, d_ff=2048,
        num_encoder_layers=6, num_decoder_layers=6,
    ),
}  # fmt: skip


def compiled(shape, work, prompt=20):
    """Bytes of arguments and temporaries of a step on one device, and its weights'."""
    method, optimizer = METHODS["prompt-tuning"], per_prompt(config().train)
    params = t5.abstract_params(shape)
    start = np.zeros((1, prompt, shape.d_model), np.float32)
    state = jax.eval_shape(lambda p: init_state(method, optimizer, p, start), params)
    array = lambda width, kind=np.int32: jax.ShapeDtypeStruct((work.rows, width), kind)
    wide, deep = work.inputs, work.targets
    batch = Batch(*map(array, (wide, wide, deep, deep, deep)), array(deep, np.float32))
    step = make_train_step(shape, method, optimizer)
    memory = (
        jax.jit(step, donate_argnums=0).lower(state, params, [batch]).compile().memory_analysis()
    )
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "inputs"), [("small", 4, 256), ("small", 16, 96), ("wide", 8, 192)]
)
def test_bytes_are_those_of_the_compiled_step(name, rows, inputs, in_turn, remat):
    shape = dataclasses.replace(SHAPES[name], remat=remat, rows_in_turn=in_turn)
    work, layout = Work(rows, 1, inputs, 4), Layout(1, 1, remat)
    arguments, temporaries = compiled(shape, work)
    counted = plan.weights(shape, layout, trainable=False)
    counted += sum(t5_cost.activations(shape, work, 1).values())
    assert counted == pytest.approx(arguments + temporaries, rel=WITHIN)


def test_cheap_layouts_come_first():
    found = list(layouts(4, 8, {"heads": 6, "vocabulary": 32_128}))
    assert found == [Layout(4, 1, False), Layout(2, 2, False), Layout(4, 1, True),
                     Layout(2, 2, True)]  # fmt: skip


def test_xxl_is_planned_for_16_chips():
    report = plan_of(config(model={"dtype": "bfloat16"}), devices=16, kind="tpu-v4")
    # that the count is the program's is tested on a small shape, in test_bench.py
    assert sum(report["flops"].values()) == pytest.approx(386e12, rel=0.01)
    best = report["best"]
    assert best["data"] * best["model"] == 16 and best["total"] < 32 * plan.GIB
    assert [row["fits"] for row in report["layouts"] if row["model"] == 1] == [False, True]
    assert (best["data"], best["model"], best["remat"]) == (8, 2, False)
    assert 0.08 < report["floor_seconds"] < 0.1
    assert report["overrides"] == ["mesh.data=8", "mesh.model=2", "model.remat=false"]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"kind": "abacus"}, "--kind is 'abacus'; known are cpu, tpu-v4"),
        ({"method": "model-tuning"}, {}, "is not counted: plan knows prompts on T5"),
        ({"train": {"batch_size": 32}}, {"devices": 7}, "7 devices divide neither"),
    ],
)
def test_what_cannot_be_planned_is_told(changes, options, words):
    with pytest.raises(UserError, match=words):
        plan_of(config(**changes), **options)
