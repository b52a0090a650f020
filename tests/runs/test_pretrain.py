"""Pre-training: exact resuming, what a run leaves behind, and mistakes as one sentence."""

import functools
import json
import os
import re
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import CONFIG, Killer, metrics, write_rows
from helpers_text import pretrain_config, word_tokenizer
from PIL import Image

from jaxprompt.cli import app
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import read_config
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.models import precision
from jaxprompt.models.checkpoints.fingerprint import fingerprint
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.t5 import t5
from jaxprompt.runtime import parallel
from jaxprompt.training import pretrain as module
from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.pretrain import pretrain
from jaxprompt.training.run_dir import check_run, open_run
from jaxprompt.training.step import TrainState

WORDS = [f"w{i}" for i in range(130)]  # the texts have the first twenty
SHAPE = {"d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32,
         "num_encoder_layers": 1, "num_decoder_layers": 1}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Runs of equal settings share their compiled step, on the one device that is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("per_member", "make_train_step"):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        make = module.per_member
        # the schedule of these runs does not depend on their number of steps
        patch.setattr(module, "per_member", lambda t: make(t.model_copy(update=SAME)))
        patch.setattr(parallel, "make_mesh", lambda mesh: MAKE_MESH(mesh, jax.devices()[:1]))
        jax.config.update("jax_disable_most_optimizations", True)  # compilation is what takes long
        yield
        jax.config.update("jax_disable_most_optimizations", False)


MAKE_MESH = parallel.make_mesh
SAME = {"steps": 1, "evaluate_every": 1, "checkpoint_every": 1, "trackers": ()}  # may be hashed


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """A run of 12 steps with every objective; its text counts to twenty over and over."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("\n".join([" ".join(WORDS[:20])] * 30))
    pairs = [{"input": f"w{i} w{i + 1}", "target": f"w{i + 2}", "prompt": i % 2} for i in range(18)]
    return {
        "shape": SHAPE,
        "tokenizer": str(word_tokenizer(folder / "tokenizer", WORDS)),
        "text": [{"name": "book", "train": str(folder / "text.txt")}],
        "pairs": [{"name": "quiz", "train": str(write_rows(folder / "pairs.jsonl", pairs))}],
        "objectives": {"span_corruption": 2, "prefix_lm": 1, "pairs": 1},
        "input_length": 32,
        "target_length": 16,
        "text_length": [6, 24],
        "balance": 0.5,
        "validation": 0.1,
        "virtual": {"count": 2, "lengths": [2, 3]},
        "model": {"unroll": False, "dropout": 0.1},
        "train": {"steps": 12, "batch_size": 4, "warmup_steps": 4, "evaluate_every": 4,
                  "learning_rate": 0.03, "checkpoint_every": 5, "evaluate_batches": 1,
                  "tensorboard": False},
    }  # fmt: skip


def config(values, folder, **changes) -> PretrainConfig:
    return pretrain_config(values | {"output": str(folder / "run")}, **changes)


def without_clock(result):
    return {k: v for k, v in result.items() if "second" not in k and k != "model"}


def assert_same_weights(one, two):
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


def weights(folder):
    return load_backbone(str(folder / "run" / "model")).params


@pytest.fixture(scope="module")
def uninterrupted(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, pretrain(config(values, folder))


# -- what a run leaves -----------------------------------------------------------------------------


def test_a_run_leaves_everything_that_it_promises(uninterrupted, values):
    folder, result = uninterrupted[0] / "run", uninterrupted[1]
    assert result == json.loads((folder / "result.json").read_text())
    assert result["steps"] == 12 and result["start"] is None
    sets = {"span_corruption/book", "prefix_lm/book", "pairs/quiz"}
    assert set(result["held_out"]) == sets
    for score in result["held_out"].values():
        assert score["perplexity"] == pytest.approx(np.exp(score["loss"]))
        assert 0 <= score["token_accuracy"] <= 1 and score["tokens"] > 0
        assert 0 < score["loss"] < 20
    mean = np.mean([score["loss"] for score in result["held_out"].values()])
    assert result["loss"] == pytest.approx(mean)
    assert result["source_tokens"]["book"] == 27 * 20
    assert 0 < result["tokens"] <= 12 * 4 * (32 + 16)
    assert set(os.listdir(folder)) == {
        "config.yaml", "metrics.jsonl", "result.json", "samples.jsonl", "losses.png", "model",
        "tokens", "checkpoints",
    }  # fmt: skip
    kept = parse(PretrainConfig, read_config(folder / "config.yaml"))
    assert kept == precision.resolve_config(config(values, folder.parent))
    with Image.open(folder / "losses.png") as image:
        assert image.size[0] > 500 and len(image.convert("RGB").getcolors(10**6)) > 10


def test_the_rows_of_a_run(uninterrupted):
    rows, result = metrics(uninterrupted[0] / "run"), uninterrupted[1]
    scores = [row for row in rows if "held_out/pairs/quiz/loss" in row]
    assert [row["step"] for row in scores] == [0, 4, 8, 12]
    assert [row["step"] for row in rows if "loss" in row] == [10]
    assert [row["tokens"] for row in scores] == sorted(row["tokens"] for row in scores)
    assert scores[0]["tokens"] == 0 and scores[-1]["tokens"] == result["tokens"]
    for name, score in result["held_out"].items():
        assert scores[-1][f"held_out/{name}/loss"] == score["loss"]


def test_samples_are_held_out_text_with_blanks(uninterrupted):
    lines = (uninterrupted[0] / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    spans = [s for s in samples if s["held_out"] == "span_corruption/book"]
    assert len(samples) == 6 and len(spans) == 3
    assert all(isinstance(s["written"], str) and s["target"] for s in samples)
    for sample in spans:
        assert "<extra_id_0>" in sample["input"] and sample["target"].startswith("<extra_id_0>")
        assert "<pad>" not in sample["input"] + sample["target"]


def test_the_model_is_a_backbone_with_its_tokenizer(uninterrupted, values):
    folder, result = uninterrupted
    backbone = load_backbone(result["model"])
    assert backbone.fingerprint == fingerprint(backbone.params) == result["fingerprint"]
    assert backbone.config.vocab_size == 256  # 153 pieces: no virtual token is left in it
    assert backbone.config.d_model == 16 and backbone.config.num_decoder_layers == 1
    assert sum(x.size for x in jax.tree.leaves(backbone.params)) == result["parameters"]
    mine, given = load_tokenizer(backbone.path), load_tokenizer(values["tokenizer"])
    assert mine.fingerprint() == given.fingerprint()
    assert mine.sentinel_ids == given.sentinel_ids


def test_every_parameter_and_virtual_token_is_trained(uninterrupted, values):
    trained = weights(uninterrupted[0])
    words = load_tokenizer(values["tokenizer"])
    new = module._model(config(values, uninterrupted[0]), words, MAKE_MESH())
    start = module._init(new, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained, start)
    assert jax.tree.all(moved)


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5, 7, 11, 12, "step 0", "step 4", "step 12", "tokens for"])
def test_killed_and_started_again_weights_are_bit_identical(uninterrupted, values, tmp_path, at):
    run = config(values, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(run, Killer(at))
    assert not (tmp_path / "run" / "result.json").exists()
    result = pretrain(run)
    assert_same_weights(weights(tmp_path), weights(uninterrupted[0]))
    assert metrics(tmp_path / "run") == metrics(uninterrupted[0] / "run")
    assert without_clock(result) == without_clock(uninterrupted[1])
    samples = [(f / "run" / "samples.jsonl").read_text() for f in (tmp_path, uninterrupted[0])]
    assert samples[0] == samples[1]
    assert not [n for n in os.listdir(tmp_path / "run") if n.startswith(".")]


def test_killed_twice_and_while_the_result_is_written(uninterrupted, values, tmp_path, monkeypatch):
    run = config(values, tmp_path)
    for at in (7, 6):  # the second before it is where the first was
        with pytest.raises(KeyboardInterrupt):
            pretrain(run, Killer(at))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(run)
    lines = []
    reporter = NullReporter()
    reporter.say = lines.append
    result = pretrain(run, reporter)
    assert "going on from step 12" in lines
    assert without_clock(result) == without_clock(uninterrupted[1])
    assert metrics(tmp_path / "run") == metrics(uninterrupted[0] / "run")


def test_a_complete_run_is_not_run_again(uninterrupted, values, monkeypatch):
    folder, result = uninterrupted
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: pytest.fail("the run began"))
    assert pretrain(config(values, folder)) == result
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_more_steps_go_on_where_the_run_ended(uninterrupted, values, tmp_path):
    pretrain(config(values, tmp_path, train={"steps": 5}))
    result = pretrain(config(values, tmp_path))
    assert_same_weights(weights(tmp_path), weights(uninterrupted[0]))
    assert without_clock(result) == without_clock(uninterrupted[1])


@pytest.mark.parametrize("what", ["text/book", "pairs/quiz", "tokenizer", "backbone/fingerprint"])
def test_other_inputs_at_the_same_paths_are_refused(uninterrupted, values, tmp_path, what):
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text("\n".join([" ".join(WORDS[:20])] * 30))
    rows = [{"input": f"w{i} w{i + 1}", "target": f"w{i + 2}", "prompt": i % 2} for i in range(18)]
    start, tokenizer = tmp_path / "start", word_tokenizer(tmp_path / "tokenizer", WORDS)
    shutil.copytree(uninterrupted[0] / "run" / "model", start)
    run = config(
        values, tmp_path, start=str(start), tokenizer=str(tokenizer), train={"checkpoint_every": 2},
        text=[{"name": "book", "train": str(text)}],
        pairs=[{"name": "quiz", "train": str(write_rows(pairs, rows))}],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        pretrain(run, Killer(3))
    if what == "text/book":
        text.write_text("\n".join([" ".join(WORDS[1:21])] * 30))
    elif what == "pairs/quiz":
        write_rows(pairs, [*rows[1:], rows[0]])
    elif what == "tokenizer":
        word_tokenizer(tmp_path / "tokenizer", [*WORDS[:20], *WORDS[:19:-1]])  # same ids of texts
    else:
        shape = load_backbone(str(start)).config
        save_hf(start, shape, jax.jit(t5.init_params, static_argnums=0)(shape, jax.random.key(9)))
    with pytest.raises(UserError, match=f"other data or weights .*{what} was .* and is "):
        pretrain(run)


def test_fewer_steps_than_done_are_refused(values, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(values, tmp_path), Killer(7))
    with pytest.raises(UserError, match="has done 5 steps, and train.steps is 3; make it 5"):
        pretrain(config(values, tmp_path, train={"steps": 3}))


def test_a_result_goes_before_the_model_that_it_tells_of(values, tmp_path):
    pretrain(config(values, tmp_path, train={"steps": 5}))
    for at, there in ((7, True), (11, False)):
        with pytest.raises(KeyboardInterrupt):
            pretrain(config(values, tmp_path), Killer(at))
        assert (tmp_path / "run" / "result.json").exists() == there


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": {"learning_rate": 0.5}}, r"train.learning_rate was 0.03 and is 0.5"),
        ({"validation": 0.2}, "validation was 0.1 and is 0.2"),
        ({"objectives": {"span_corruption": 1}}, "objectives.span_corruption was 2.0 and is 1.0"),
        ({"pairs": [], "objectives": {"pairs": 1}}, "objective 'pairs' reads pairs"),
    ],
)
def test_other_settings_in_the_same_place_are_refused(uninterrupted, values, changes, words):
    with pytest.raises(UserError, match=words):
        pretrain(config(values, uninterrupted[0], **changes))


def test_steps_may_change_only_where_the_schedule_does_not_count_them(values, tmp_path):
    for settings, free in (
        ({"schedule": "rsqrt"}, True),
        ({"schedule": "constant"}, True),
        ({"schedule": "cosine"}, False),
        ({"schedule": "rsqrt", "cooldown_steps": 2}, False),  # its place follows from the steps
    ):
        folder = tmp_path / "-".join(map(str, settings.values()))
        with open_run(config(values, folder, train=settings)):
            (folder / "run" / "checkpoints" / "5").mkdir(parents=True)
        more = config(values, folder, train=settings | {"steps": 20})
        if free:
            check_run(more)
        else:
            with pytest.raises(UserError, match="train.steps was 12 and is 20"):
                check_run(more)


# -- learning --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(values, tmp_path_factory):
    """A text that one look teaches: which word follows which."""
    folder = tmp_path_factory.mktemp("learned")
    train = {"steps": 150, "evaluate_every": 75, "checkpoint_every": 150}
    return folder, pretrain(config(values, folder, train=train, objectives=SPANS))


SPANS = {"span_corruption": 1}


def test_a_text_that_can_be_learned_is_learned(learned):
    folder, result = learned
    first, *_, last = [
        row["held_out/span_corruption/book/loss"]
        for row in metrics(folder / "run")
        if "held_out/span_corruption/book/loss" in row
    ]
    assert last < 0.5 * first and result["loss"] == last


def test_adaptation_keeps_shape_and_vocabulary_and_changes_the_weights(values, learned, tmp_path):
    start = str(learned[0] / "run" / "model")
    before = load_backbone(start)
    result = pretrain(
        config(values, tmp_path, start=start, tokenizer=None, shape={"d_model": 512},
               objectives={"prefix_lm": 1}, train={"steps": 3})
    )  # fmt: skip
    after = load_backbone(result["model"])
    assert after.config == before.config
    assert result["start"] == start and result["fingerprint"] == after.fingerprint
    assert after.fingerprint != before.fingerprint == load_backbone(start).fingerprint
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), after.params, before.params)
    assert 0 < min(jax.tree.leaves(moved)) and max(jax.tree.leaves(moved)) < 0.2
    assert load_tokenizer(after.path).fingerprint() == load_tokenizer(start).fingerprint()
    first = next(row for row in metrics(tmp_path / "run") if row["step"] == 0)
    assert set(first) == {"step", "tokens", "held_out/prefix_lm/book/loss"}


def test_two_devices_give_what_one_gives(values, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(module, "fill_in", lambda *_: [])
    for count in (1, 2):
        mesh = lambda config, n=count: MAKE_MESH(config, jax.devices()[:n])
        monkeypatch.setattr(parallel, "make_mesh", mesh)
        run = config(values, tmp_path / str(count), mesh={"data": count}, train={"steps": 3})
        found[count] = pretrain(run), weights(tmp_path / str(count))
    (one, alone), (two, together) = found.values()
    assert one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def test_a_mesh_may_change_when_a_run_goes_on(uninterrupted, values):
    moved = config(values, uninterrupted[0], mesh={"data": 2, "tensor": 1})
    check_run(precision.resolve_config(moved))


# -- tokenizers ------------------------------------------------------------------------------------


def test_a_trained_tokenizer_is_trained_once_and_again_for_other_settings(
    values, tmp_path, monkeypatch
):
    made = []
    sentences = [f"{chr(97 + i % 26) * (i % 5 + 2)} runs to {i}" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(sentences))
    text = [{"name": "book", "train": str(tmp_path / "text.txt")}]
    train = module.train_tokenizer
    monkeypatch.setattr(
        module, "train_tokenizer", lambda *a: (made.append(a[1].vocabulary), train(*a))
    )

    def place(size, **changes):
        sizes = {"vocabulary": size, "sentinels": 10}
        run = config({**values, "text": text, "tokenizer": sizes, **changes}, tmp_path)
        folder = tmp_path / "run"
        begin = lambda: folder.mkdir(exist_ok=True)
        return load_tokenizer(module._tokenizer_place(run, folder, begin, NullReporter()))

    first = place(150)
    assert first.size == 150 and place(150).fingerprint() == first.fingerprint()
    assert made == [150]
    assert place(160).size == 160  # no checkpoint yet: the settings were mended
    assert made == [150, 160]
    other = [{"name": "tale", "train": str(tmp_path / "text.txt")}]
    assert place(160, text=other).size == 160 and made == [150, 160, 160]
    (tmp_path / "run" / "tokenizer" / "trained_on.json").unlink()
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    place(160, text=other)  # a run that goes on keeps what its weights know
    assert made == [150, 160, 160]


def test_the_tokenizer_of_a_hub_id_stands_beside_the_weights(values, tmp_path, monkeypatch):
    mine = load_tokenizer(values["tokenizer"])
    monkeypatch.setattr(module, "load_tokenizer", lambda place: mine)
    monkeypatch.setattr(module, "save_hf", lambda *_, **__: None)
    state = TrainState(jnp.int32(0), {"model": {}}, ())
    module.save_model(tmp_path, t5.T5Model(CONFIG), state, "somebody/tokenizer")
    assert load_tokenizer(tmp_path / "model").fingerprint() == mine.fingerprint()


# -- the command -----------------------------------------------------------------------------------


def write_run(values, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"output": str(tmp_path / "run")} | values))
    return file


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process; (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxprompt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def refused(call, values, tmp_path):
    """Expect a mistake in changed values or overrides; return its one sentence."""

    def run(*overrides, **changes):
        code, out, err = call("pretrain", write_run(values | changes, tmp_path), *overrides)
        *progress, last = err.strip().splitlines()
        assert code == 2 and out == "", (code, out, err)
        assert last.startswith("error: ") and "Traceback" not in err, err
        assert sum("error" in line for line in progress) == 0, err
        left = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
        assert not [p for p in left if p.name.startswith(".") or ".part" in p.name]
        # a run that has not begun: it may start again with other settings
        assert {p.parts[len(tmp_path.parts) + 1] for p in left} <= {
            "config.yaml", "tokens", "tokenizer",
        }  # fmt: skip
        return last

    return run


def test_a_run_from_the_command_line(call, values, tmp_path):
    (tmp_path / "text.txt").write_text(
        "\n".join(f"{chr(97 + i % 26) * (i % 5 + 2)} runs to {i}, as it must." for i in range(400))
    )
    text = [{"name": "book", "train": str(tmp_path / "text.txt")}]
    small = values | {"tokenizer": {"vocabulary": 150, "sentinels": 10}, "text": text}
    command = ["pretrain", write_run(small, tmp_path), "train.steps=2", "train.evaluate_every=2"]
    code, out, err = call(*command)
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 2 and "training a tokenizer of 150 rows" in err
    assert "span_corruption/book" in err and str(tmp_path / "run" / "model") in err
    tokenizer = load_tokenizer(result["model"])
    assert tokenizer.size == 150 and tokenizer.sentinel_ids[0] == 149
    code, out, err = call(*command)
    assert code == 0 and json.loads(out) == result and "is complete" in err


def test_an_interrupt_says_how_to_go_on(call, values, tmp_path, monkeypatch):
    def interrupted(config, bar, signals):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "pretrain", interrupted)
    code, out, err = call("pretrain", write_run(values, tmp_path))
    assert (code, out) == (0, "") and "SIGTERM; run the same command again to go on" in err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text": [{"name": "a", "train": "none.txt"}]}, "no file 'none.txt' (source 'a')"),
        ({"pairs": [{"name": "a", "train": "no.csv"}]}, "There is no file 'no.csv' (source 'a')"),
        ({"tokenizer": {"vocabulary": 300}, "text": [{"name": "a", "train": "none.txt"}]},
         "There is no file 'none.txt' (source 'a')"),
        ({"pairs": []}, "objective 'pairs' reads pairs, and none is given; add it"),
        ({"text": []}, "objective 'prefix_lm' reads text, and none is given; add it"),
        ({"objectives": {}}, "Config key 'objectives' is {}"),
        ({"objectives": {"spans": 1}}, "'objectives.spans' is 'spans': input should be 'span_cor"),
        ({"objectives": {"pairs": 0}}, "'objectives.pairs' is 0: input should be greater than 0"),
        ({"text": [{"name": n, "train": "a.txt"} for n in "aba"]}, "two sources are named 'a'"),
        ({"text": [{"name": "quiz", "train": "a.txt"}]}, "two sources are named 'quiz'"),
        ({"text": [{"train": "a.txt"}]}, "The config lacks 'text.0.name'; add it"),
        ({"text": [{"name": "a", "train": "a.txt", "colum": "x"}]},
         "Unknown config key 'text.0.colum'; did you mean 'column'"),
        ({"text": "a.txt"}, "Config key 'text' is 'a.txt': input should be a valid list"),
        ({"tokenizer": None}, "a new backbone needs a tokenizer; name one, or give tokenizer.voc"),
        ({"tokenizer": 5}, "Config key 'tokenizer' is 5: input should be text"),
        ({"tokenizer": {"vocab": 300}}, "Unknown config key 'tokenizer.vocab'; did you mean 'voc"),
        ({"tokenizer": {"vocabulary": "big"}}, "error: Config key 'tokenizer.vocabulary' is 'big'"),
        ({"tokenizer": {"vocabulary": 300}, "text": [], "objectives": {"pairs": 1}},
         "a tokenizer is trained on text, and none is given; add it"),
        ({"tokenizer": "./nowhere"}, "no tokenizer that can be read at './nowhere'"),
        ({"tokeniser": "x"}, "Unknown config key 'tokeniser'; did you mean 'tokenizer'"),
        ({"virtual": {"count": 2, "lenghts": [3]}}, "'virtual.lenghts'; did you mean 'lengths'"),
        ({"virtual": {"count": 2, "lengths": [3, 31]}}, "31 virtual tokens leave no room for text"),
        ({"virtual": {"count": 2, "lengths": []}}, "Config key 'virtual.lengths' is []"),
        ({"text_length": [9, 5]}, "text_length is [9, 5]; give [shortest, longest] from 4 on"),
        ({"start": "./nowhere", "tokenizer": None}, "there is no directory ./nowhere"),
        ({"start": "./nowhere", "tokenizer": {"vocabulary": 300}},
         "the weights of start have a tokenizer; leave tokenizer out"),
        ({"noise_density": 1.0}, "Config key 'noise_density' is 1.0: input should be less than 1"),
        ({"validation": 0}, "Config key 'validation' is 0: input should be greater than 0"),
        ({"shape": {"layers": 2}}, "Unknown config key 'shape.layers'"),
        ({"mesh": {"data": 3}}, "does not cover 1 device(s)"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_run_starts(refused, tmp_path, changes, words):
    sentence = refused(**changes)
    assert words in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.step=3", "Unknown config key 'train.step'; did you mean 'steps'"),
        ("train.optimizer=adafactor-t5x", "input should be 'adafactor' or 'adamw'"),
        ("trian.steps=3", "Unknown config key 'trian'; did you mean 'train'"),
        ("input_length=many", "Config key 'input_length' is 'many'"),
        ("text=[", "is not valid YAML"),
    ],
)
def test_mistakes_in_overrides(refused, tmp_path, override, words):
    assert words in refused(override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, content, source, words",
    [
        ("a.txt", "", {}, "Text source 'a' .*holds no text"),
        ("a.txt", "w1 w2 w3 w4 w5", {}, "'a' has 1 document; at least 2 are needed"),
        ("a.txt", b"\xff", {}, "a.txt is not UTF-8 text"),
        (
            "a.jsonl",
            '{"text": "w1"}\n',
            {"column": "body"},
            "Row 1 of .* no text in 'body'; it has",
        ),
        ("a.jsonl", '{"text": \n', {}, "a.jsonl, line 1, column 1: not valid JSON"),
        ("a.csv", "text\n", {}, "holds no rows"),
        ("a.pdf", "x", {}, "must end in"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_texts_that_cannot_be_used(refused, tmp_path, name, content, source, words, trained):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = {"text": [{"name": "a", "train": str(tmp_path / name)} | source]}
    if trained and "document;" not in words:
        changes["tokenizer"] = {"vocabulary": 300}
    sentence = refused(**changes)
    assert re.search(words, sentence), sentence


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"input": "w1", "target": "w2", "prompt": 2},
            "has prompt 2, and virtual.count allows 0 to",
        ),
        (
            {"input": "w1", "target": "w2", "prompt": "x"},
            "has prompt 'x', and virtual.count allows",
        ),
        ({"input": "w1"}, "no text in 'target'; it has ['input']"),
        ({"text": "w1", "target": "w2"}, "no text in 'input'; it has ['target', 'text']"),
        ({"input": None, "target": "w2"}, "no text in 'input'"),
    ],
)
def test_pairs_that_cannot_be_used(refused, tmp_path, row, words):
    good = {"input": "w1", "target": "w2", "prompt": 0}
    file = write_rows(tmp_path / "p.jsonl", [good, row])
    sentence = refused(pairs=[{"name": "p", "train": str(file)}])
    assert words in sentence and "Row 2 of" in sentence


def test_prompts_without_virtual_tokens(refused):
    assert "has prompt 0, and virtual.count allows none; set virtual.count" in refused(virtual=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_length": 4, "objectives": {"prefix_lm": 1}, "virtual": None},
        {"target_length": 1, "objectives": {"prefix_lm": 1}},
        {"target_length": 2, "objectives": {"span_corruption": 1}},
    ],
)
def test_rows_too_short_for_the_objective(refused, changes):
    sentence = refused(**changes)
    assert "are too short for" in sentence and "raise input_length or target_length" in sentence


def test_a_tokenizer_that_is_too_large_for_the_weights(refused, uninterrupted, tmp_path):
    large = word_tokenizer(tmp_path / "large", [f"x{i}" for i in range(400)])
    sentence = refused(start=str(uninterrupted[0] / "run" / "model"), tokenizer=str(large))
    assert "has 423 pieces and the backbone 256 rows; use the tokenizer that belongs" in sentence
    assert not (tmp_path / "run").exists()


def test_too_little_text_for_a_tokenizer(refused):
    sentence = refused(tokenizer={"vocabulary": 5000})
    assert "pieces, and tokenizer.vocabulary asks for 4900 beside 100 sentinels" in sentence


def test_an_output_that_is_something_else_is_left_alone(call, values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    code, out, err = call("pretrain", write_run(values, tmp_path))
    assert (code, out) == (2, "") and "exists and is not a run; choose another output" in err
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]
