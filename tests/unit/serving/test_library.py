"""A library: prompts with the statistics of their tasks, and the router of a server."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import make_backbone, make_rows, write_rows
from typer.testing import CliRunner

from jaxprompt.cli import app
from jaxprompt.cli.library import named_prompts
from jaxprompt.config.errors import UserError
from jaxprompt.inference.session import open_session
from jaxprompt.methods.artefact import save_prompt
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.serving.features import text_features, text_of
from jaxprompt.serving.library import LibraryRouter, add_prompts, collect
from jaxprompt.serving.router import load_router


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(make_backbone(tmp_path_factory.mktemp("backbone"))))


def prompt_of(folder, backbone, name, rows):
    """A prompt whose task has these rows."""
    data = write_rows(folder / f"{name}.jsonl", rows)
    task = {"name": name, "template": "say {text}", "labels": ["yes", "no"],
            "train": str(data), "validation": str(data)}  # fmt: skip
    recorded = {"source": str(backbone.path), "fingerprint": backbone.fingerprint}
    prompt = Prompt(np.ones((2, 16), np.float32), {"backbone": recorded, "task": task})
    save_prompt(folder / f"{name}-prompt", prompt)
    return folder / f"{name}-prompt"


@pytest.fixture
def prompts(tmp_path, backbone):
    short = [{"text": f"{a} {b}", "label": "no"} for a in ("one", "two", "three") for b in
             ("good", "bad", "it", "was")]  # fmt: skip
    sentences = make_rows(12)
    return {
        "short": prompt_of(tmp_path, backbone, "short", short),
        "long": prompt_of(tmp_path, backbone, "long", sentences),
    }


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_adding_and_removing_a_task_changes_no_byte_of_other_prompts(tmp_path, backbone, prompts):
    library = tmp_path / "library"
    add_prompts(library, {"short": prompts["short"]})
    first = collect(library, backbone)
    assert (first.added, first.removed, first.left_out) == (["short"], [], {})
    before = contents(library / "short")
    mean = first.router.tasks["short"].mean
    add_prompts(library, {"acme/long": prompts["long"]})
    second = collect(library, backbone)
    assert second.added == ["acme/long"] and contents(library / "short") == before
    assert np.array_equal(load_router(library).tasks["short"].mean, mean)
    shutil.rmtree(library / "acme")
    third = collect(library, backbone)
    assert third.removed == ["acme/long"] and third.added == []
    assert np.array_equal(third.router.limits, first.router.limits)
    assert contents(library / "short") == before


def test_the_router_of_a_library_follows_its_file(tmp_path, backbone, prompts):
    library = tmp_path / "library"
    add_prompts(library, prompts)
    collect(library, backbone)
    router = LibraryRouter(library, backbone, interval=0.0)
    [vector] = text_features(open_session(None, backbone), ["two three it was bad"])
    found = router.choose(vector)
    assert found.candidates[0][0] == "long" and found.margin > 0
    assert router.choose(vector, ["short"]).margin is None
    with pytest.raises(UserError, match="name a prompt"):
        router.choose(vector, ["other"])
    shutil.rmtree(library / "long")
    collect(library, backbone)
    assert router.choose(vector).candidates[0][0] == "short"
    (library / "router.safetensors").write_bytes(b"damaged")  # the old one goes on
    assert router.choose(vector).candidates[0][0] == "short"
    with pytest.raises(UserError, match="jaxprompt library"):
        LibraryRouter(tmp_path, backbone)


def test_prompts_that_cannot_be_routed_to_are_left_out_with_the_reason(tmp_path, backbone, prompts):
    library = tmp_path / "library"
    add_prompts(library, prompts)
    save_prompt(library / "silent", Prompt(np.ones((2, 16), np.float32), {}))
    os.unlink(tmp_path / "long.jsonl")
    found = collect(library, backbone)
    assert found.added == ["short"] and set(found.left_out) == {"silent", "long"}
    assert "does not say which task" in found.left_out["silent"]
    other = Prompt(np.ones((2, 16), np.float32), {"backbone": {"fingerprint": "feed"}})
    save_prompt(library / "other", other)
    with pytest.raises(UserError, match="The prompt 'other' of the library: .*other weights"):
        collect(library, backbone)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no prompts"):
        collect(tmp_path / "empty", backbone)


def test_a_text_is_the_same_alone_and_beside_others(backbone):
    session = open_session(None, backbone)
    texts = ["one it was good", "two three it was bad", "", "good"]
    together = text_features(session, texts)
    alone = np.concatenate([text_features(session, [text]) for text in texts])
    assert together.shape == (4, 16) and np.allclose(together, alone, atol=1e-5)
    assert text_features(session, []).shape == (0, 16)
    assert text_of({"b": "x", "a": "y", "n": None}) == "x\ny\nnull"
    assert text_of({"b": "x", "a": "y"}, ["a", "c"]) == "y"


@pytest.mark.no_type_check  # typer passes what the option's callback returns, which is None
def test_the_command_collects_and_tells_in_json(tmp_path, prompts):
    run = lambda *words: CliRunner().invoke(app.app, ["library", *map(str, words)])
    result = run(tmp_path / "library", prompts["short"], f"mine={prompts['long']}")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told["prompts"]) == {"short", "mine"} == set(told["added"])
    facts = json.loads((tmp_path / "library" / "router.json").read_text())
    assert facts["tasks"]["mine"]["held_out_rows"] == 12
    with pytest.raises(UserError, match="Two prompts are named 'short'"):
        named_prompts([str(prompts["short"]), f"short={prompts['long']}"])
