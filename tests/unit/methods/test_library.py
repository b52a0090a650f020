"""Prompts of a library by their similarity to a prompt."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxprompt.cli.use import similar
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.artefact import Prompt, save_peft, save_prompt
from jaxprompt.methods.library import similar_prompts
from jaxprompt.training.population import init_trainables, nearest_notes

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(4, 8)).astype(np.float32)
OTHER_LENGTH = np.concatenate([BASE, BASE])


def saved(path, vectors, fingerprint=None, task=None, **backbone):
    metadata = {"method": "prompt-tuning"}
    if fingerprint:
        metadata["backbone"] = {"source": "some/t5", "fingerprint": fingerprint, **backbone}
    if task:
        metadata["task"] = {"name": task}
    save_prompt(path, Prompt(vectors.astype(np.float32), metadata))
    return path


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    saved(folder / "far", -BASE, "one", "opposite")
    saved(folder / "runs" / "near" / "prompt", OTHER_LENGTH + 0.1, "one", "near")
    np.save(folder / "alike.npy", 3 * OTHER_LENGTH)
    save_peft(folder / "peft", Prompt(BASE + 1, {}))
    return folder


def test_the_most_similar_prompt_comes_first(library, tmp_path):
    brief = saved(tmp_path / "brief", BASE, "one", "mine")
    ranking = similar_prompts(brief, library)
    names = [one.prompt.removeprefix(f"{library}/") for one in ranking.similar]
    assert names == ["alike.npy", "runs/near/prompt", "peft", "far"] and not ranking.left_out
    first, *_, last = ranking.similar
    np.testing.assert_allclose([first.cosine, last.cosine], [1, -1], rtol=1e-6)
    assert [one.task for one in ranking.similar] == [None, "near", None, "opposite"]


def test_the_measures_are_those_of_the_paper(tmp_path):
    other = RNG.normal(size=(3, 8)).astype(np.float32)
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    (one,) = similar_prompts(
        saved(tmp_path / "a", BASE), saved(tmp_path / "lib" / "b", other).parent
    ).similar
    np.testing.assert_allclose(one.cosine, cosine(BASE.mean(0), other.mean(0)), rtol=1e-5)
    pairs = [cosine(x, y) for x in BASE for y in other]
    np.testing.assert_allclose(one.per_token, np.mean(pairs), atol=1e-6)


def test_a_prompt_in_its_own_library_is_not_compared_with_itself(library):
    ranking = similar_prompts(library / "far", library)
    assert len(ranking.similar) == 3 and not ranking.left_out


def test_what_cannot_be_compared_is_left_out_with_its_reason(library, tmp_path):
    saved(library / "wide", np.ones((4, 9)), "one")
    saved(library / "stranger", BASE, "two")
    (saved(library / "damaged", BASE) / "prompt.safetensors").write_bytes(b"")
    brief = saved(tmp_path / "brief", BASE, "one")
    left_out = similar_prompts(brief, library).left_out
    reasons = {path.rpartition("/")[2]: reason for path, reason in left_out.items()}
    assert reasons.keys() == {"wide", "stranger", "damaged"}
    assert reasons["wide"] == "its vectors have 9 numbers, and 8 are needed"
    assert reasons["stranger"] == "it was tuned on another backbone, 'some/t5'"
    assert "is damaged or missing" in reasons["damaged"]
    more = similar_prompts(brief, library, any_backbone=True)
    assert len(more.similar) == 5 and len(more.left_out) == 2


def test_a_copy_of_the_backbone_in_float16_is_the_same_backbone(tmp_path):
    brief = saved(tmp_path / "brief", BASE, "one", fingerprint_float16="half")
    saved(tmp_path / "lib" / "a", BASE, "half")
    assert len(similar_prompts(brief, tmp_path / "lib").similar) == 1


@pytest.mark.parametrize(
    "vectors, fill, message",
    [
        (BASE, None, "There is no folder '.*lib'; give one with prompts"),
        (BASE, [], "'.*lib' holds no other prompt; give a folder with artefacts"),
        (BASE, [np.ones((2, 3))], "None of the 1 prompts in .* the first is .* have 3 numbers"),
    ],
)
def test_a_library_without_prompts_is_one_sentence(tmp_path, vectors, fill, message):
    brief = saved(tmp_path / "brief", vectors)
    if fill is not None:
        (tmp_path / "lib").mkdir()
        for number, other in enumerate(fill):
            saved(tmp_path / "lib" / str(number), other)
    with pytest.raises(UserError, match=message):
        similar_prompts(brief, tmp_path / "lib")


def test_the_command_prints_a_table_and_json(library, tmp_path, capsys):
    similar(saved(tmp_path / "brief", BASE, "one"), library)
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert [one["task"] for one in answer["similar"]] == [None, "near", None, "opposite"]
    assert answer["similar"][0]["prompt"] == str(library / "alike.npy") and not answer["left_out"]
    assert err.splitlines()[1].split() == ["1.0000", f"{answer['similar'][0]['per_token']:.4f}",
                                           str(library / "alike.npy")]  # fmt: skip


@pytest.mark.no_type_check
def test_a_run_starts_from_the_most_similar_prompt(library, tmp_path):
    brief = saved(tmp_path / "brief", BASE, "one")
    values = {
        "task": "boolq", "output": "x",
        "prompt": {"init": "nearest", "file": str(brief), "library": str(library), "length": 8},
    }  # fmt: skip
    run = parse(RunConfig, values)
    assert nearest_notes([run, run]) == [
        f"starts from {library}/alike.npy, the most similar to {brief} (cosine 1.000)"
    ]
    backbone = SimpleNamespace(
        params={"token_embedder": {"embedding": np.zeros((9, 8), np.float32)}},
        config=SimpleNamespace(d_model=8, vocab_size=9),
    )
    tokenizer = SimpleNamespace(
        one_sequence=True, start_ids=[], size=9, special_ids=[], encode=lambda text: [3],
        encode_words=lambda words, separator: [[3] for _ in words],
    )  # fmt: skip
    task = TaskConfig(name="mine", template="{x}", labels=["a", "b"])
    trainables = init_trainables(run, task, backbone, tokenizer)
    np.testing.assert_array_equal(trainables["prompt"][0], 3 * OTHER_LENGTH)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"file": "a"}, "init=nearest needs prompt.library; give it"),
        ({"library": "a"}, "init=nearest needs prompt.file; give it"),
    ],
)
def test_the_nearest_prompt_needs_a_prompt_and_a_library(settings, message):
    with pytest.raises(UserError, match=message):
        parse(RunConfig, {"task": "boolq", "output": "x", "prompt": {"init": "nearest"} | settings})
