"""Stores of prompts: directories, buckets, repositories of the hub."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import save_prompt
from jaxprompt.methods.tuned import Prompt
from jaxprompt.serving import artefacts
from jaxprompt.serving import store as store_module
from jaxprompt.serving.artefacts import digest_of, files_of, read_artefact
from jaxprompt.serving.hub_store import HubStore
from jaxprompt.serving.store import (
    DirectoryStore,
    ObjectStore,
    PathStore,
    ReadOnlyStore,
    StoreUnavailable,
    UnknownPrompt,
    changes,
    check_name,
    open_store,
)


def prompt_of(value: float, length: int = 2) -> Prompt:
    return Prompt(np.full((length, 4), value, np.float32), {"step": 3})


@pytest.fixture(scope="module")
def contents():
    """The files of three prompts that differ."""
    return [files_of(prompt_of(value)) for value in (1.0, 2.0, 3.0)]


@pytest.fixture(params=["directory", "memory"])
def store(request, tmp_path):
    if request.param == "directory":
        return DirectoryStore(tmp_path)
    return open_store(f"memory://{tmp_path.name}/prompts")


# ---- what all stores do


def test_what_is_written_is_read_and_told_by_its_digest(store, contents):
    assert store.list() == {}
    stamp = store.write("spam", contents[0])
    store.write("acme/spam", contents[1])
    assert set(store.list()) == {"spam", "acme/spam"} and store.list()["spam"] == stamp
    assert store.read("spam") == contents[0]
    digest = digest_of(contents[1])
    assert store.read("acme/spam", digest) == contents[1]
    with pytest.raises(UnknownPrompt, match="no version"):
        store.read("spam", digest)


def test_changes_name_what_is_new_different_and_gone(store, contents):
    for name in ("kept", "replaced", "removed"):
        store.write(name, contents[0])
    seen = store.list()
    assert changes(store, seen) == ({}, frozenset())
    store.write("replaced", contents[1])
    store.write("new", contents[1])
    store.delete("removed")
    found = changes(store, seen)
    assert set(found.changed) == {"replaced", "new"} and found.gone == {"removed"}
    assert store.read("replaced") == contents[1]


def test_what_is_not_there_is_an_error_of_its_own(store, contents):
    for act in (store.read, store.delete):
        with pytest.raises(UnknownPrompt):
            act("nothing")
    store.write("some", contents[0])
    store.delete("some")
    with pytest.raises(UnknownPrompt):
        store.read("some")


@pytest.mark.parametrize(
    "name", ["", "Spam", "../x", "a/../b", "a/b/c", "/etc", "a/", ".a", "a-", "a\n", "a" * 65, "é"]
)
def test_names_that_lead_elsewhere_are_refused(store, name, contents):
    for act in (store.read, store.delete, lambda name: store.write(name, contents[0])):
        with pytest.raises(UserError, match="cannot be the name of a prompt"):
            act(name)


def test_short_and_long_names_are_allowed():
    for name in ("a", "7", "a.b_c-d", "a" * 64, "acme/spam.v2"):
        assert check_name(name) == name


# ---- a directory


def test_a_directory_takes_what_is_copied_into_it(tmp_path):
    store = DirectoryStore(tmp_path)
    save_prompt(tmp_path / "spam", prompt_of(1.0))
    save_prompt(tmp_path / "acme" / "mail", prompt_of(1.0))
    (tmp_path / "notes").mkdir()
    (tmp_path / "router.json").write_text("{}")
    save_prompt(tmp_path / "Loud Name", prompt_of(1.0))
    assert set(store.list()) == {"spam", "acme/mail"}
    shutil.rmtree(tmp_path / "spam")
    assert set(store.list()) == {"acme/mail"}


def test_links_are_not_followed(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    save_prompt(outside, prompt_of(1.0))
    root.mkdir()
    (root / "linked").symlink_to(outside)
    save_prompt(root / "inner", prompt_of(2.0))
    (root / "inner" / "prompt.safetensors").unlink()
    (root / "inner" / "prompt.safetensors").symlink_to(outside / "prompt.safetensors")
    store = DirectoryStore(root)
    assert set(store.list()) == {"inner"}
    with pytest.raises(UnknownPrompt):
        store.read("linked")
    with pytest.raises(UserError, match="plain file"):
        store.read("inner")
    with pytest.raises(UserError, match="symbolic link"):
        store.write("linked", files_of(prompt_of(3.0)))
    assert np.array_equal(read_artefact(PathStore({"x": outside}).read("x"), "x").vectors,
                          prompt_of(1.0).vectors)  # fmt: skip


def test_a_fifo_in_the_place_of_a_file_blocks_nobody(tmp_path):
    save_prompt(tmp_path / "spam", prompt_of(1.0))
    (tmp_path / "spam" / "prompt.safetensors").unlink()
    os.mkfifo(tmp_path / "spam" / "prompt.safetensors")
    with pytest.raises(UserError, match="no plain file"):
        DirectoryStore(tmp_path).read("spam")


def test_what_is_larger_than_a_prompt_is_not_read(tmp_path, monkeypatch):
    save_prompt(tmp_path / "spam", prompt_of(1.0))
    with open(tmp_path / "spam" / "prompt.safetensors", "ab") as file:
        file.truncate(300 << 20)  # sparse
    with pytest.raises(UserError, match="more than 268,435,456 bytes"):
        DirectoryStore(tmp_path).read("spam")


def test_a_folder_with_other_things_is_not_overwritten(tmp_path, contents):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="other things"):
        DirectoryStore(tmp_path).write("mine", contents[0])
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_paths_of_the_command_line_are_read_only_and_followed(tmp_path, contents):
    save_prompt(tmp_path / "run" / "prompt", prompt_of(1.0))
    with pytest.raises(UserError, match="did you mean .*prompt'"):
        PathStore({"spam": tmp_path / "run"})
    store = PathStore({"spam": tmp_path / "run" / "prompt"})
    seen = store.list()
    assert store.read("spam") == contents[0]
    save_prompt(tmp_path / "run" / "prompt", prompt_of(2.0))
    assert set(changes(store, seen).changed) == {"spam"}
    with pytest.raises(ReadOnlyStore):
        store.write("spam", contents[0])
    with pytest.raises(ReadOnlyStore):
        store.delete("spam")


def test_a_disk_that_fails_is_told_apart_from_prompts_that_are_not_there(
    tmp_path, contents, monkeypatch
):
    (tmp_path / "library").mkdir()
    store = DirectoryStore(tmp_path / "library")
    store.write("spam", contents[0])
    acts = {"listed": store.list, "read": lambda: store.read("spam"),
            "written": lambda: store.write("spam", contents[1])}  # fmt: skip
    deleted = lambda: store.delete("spam")
    for number, of_writes in ((errno.EIO, StoreUnavailable), (errno.EROFS, ReadOnlyStore)):

        def broken(*given, number=number):
            raise OSError(number, "the disk fails")

        with monkeypatch.context() as patch:
            for name in ("_folders", "_read_all", "replace_directory"):
                patch.setattr(store_module, name, broken)
            for done, act in acts.items():
                kind = of_writes if done == "written" else StoreUnavailable
                with pytest.raises(kind, match=f"library.* cannot be {done} .the disk fails"):
                    act()
            patch.setattr(store_module, "_stamp", broken)
            with pytest.raises(of_writes, match="the disk fails"):
                deleted()
    assert store.read("spam") == contents[0]
    shutil.rmtree(tmp_path / "library")
    for act in (store.list, acts["read"]):  # not that all prompts are gone
        with pytest.raises(StoreUnavailable, match="No such file|not there any more"):
            act()


# ---- a bucket


def test_a_bucket_keeps_older_contents_until_the_prompt_is_deleted(tmp_path):
    store = open_store(f"memory://{tmp_path.name}/kept")
    contents = [files_of(prompt_of(value)) for value in range(7)]
    for files in contents:
        store.write("spam", files)
    assert store.read("spam") == contents[6]
    assert store.read("spam", digest_of(contents[3])) == contents[3]
    with pytest.raises(UnknownPrompt):  # KEPT newer ones are there
        store.read("spam", digest_of(contents[1]))
    store.delete("spam")
    assert not store._fs.find(store._object())


def test_content_of_a_bucket_is_checked_against_its_digest(tmp_path, contents):
    store = open_store(f"memory://{tmp_path.name}/checked")
    store.write("spam", contents[0])
    path = store._object("data", "spam", digest_of(contents[0]), "prompt.safetensors")
    store._fs.pipe_file(path, contents[1]["prompt.safetensors"])
    with pytest.raises(UserError, match="not what its digest says"):
        store.read("spam")
    store._fs.pipe_file(store._object("names", "spam.json"), b'{"contents": {"../x": {}}}')
    with pytest.raises(UserError, match="is damaged"):
        store.read("spam")
    store.write("spam", contents[0])  # as the sentence says
    store._fs.rm_file(path)
    with pytest.raises(UserError, match="not in the store; write it again"):
        store.read("spam")


def test_a_bucket_that_does_not_answer_is_told_apart(tmp_path, monkeypatch):
    store = open_store(f"memory://{tmp_path.name}/down")

    def broken(*args, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(store._fs, "find", broken)
    with pytest.raises(StoreUnavailable, match="no route to host"):
        store.list()
    with pytest.raises(UserError, match="cannot be a store|needs another package"):
        open_store("nosuch://bucket")


def test_a_real_file_system_can_be_a_bucket(tmp_path, contents):
    store = open_store(f"file://{tmp_path}/bucket")
    store.write("acme/spam", contents[0])
    assert isinstance(store, ObjectStore) and set(store.list()) == {"acme/spam"}
    assert store.read("acme/spam") == contents[0]


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, by commit: the files of each."""
    import huggingface_hub

    commits = {"c1": {}, "c2": {}}

    def model_info(self, name, revision=None):
        sha = revision or "c2"
        return SimpleNamespace(
            sha=sha, siblings=[SimpleNamespace(rfilename=path) for path in commits[sha]]
        )

    def download(name, path, revision):
        place = tmp_path / revision / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(commits[revision][path])
        return str(place)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return commits


def test_a_repository_of_the_hub_is_pinned_to_a_commit(hub, contents):
    hub["c1"].update(contents[0])
    hub["c2"].update(contents[1])
    old, new = HubStore("me/My-Prompt@c1"), open_store("hf://me/My-Prompt")
    assert old.list() == {"my-prompt": "c1"} and new.list() == {"my-prompt": "c2"}
    assert old.read("my-prompt") == contents[0] and new.read("my-prompt") == contents[1]
    with pytest.raises(ReadOnlyStore, match="push"):
        new.write("my-prompt", contents[0])


def test_a_repository_may_hold_several_prompts(hub, contents):
    for folder, files in zip(("spam", "acme/mail", "Bad Name"), contents, strict=True):
        hub["c2"].update({f"{folder}/{file}": content for file, content in files.items()})
    hub["c2"]["spam/pytorch_model.bin"] = b"pickle"
    store = HubStore("me/prompts")
    assert set(store.list()) == {"spam", "acme/mail"}
    assert store.read("acme/mail") == contents[1]
    with pytest.raises(UnknownPrompt):
        store.read("other")
    hub["c2"].clear()
    with pytest.raises(UserError, match="holds no prompt"):
        HubStore("me/prompts")


# ---- what the files must be


def damaged(files, **changes):
    return {**files, **{name.replace("_", "."): value for name, value in changes.items()}}


def test_damaged_files_are_refused_with_the_prompts_name(contents):
    good = contents[0]["prompt.safetensors"]
    header = json.dumps({"prompt": {"dtype": "F32", "shape": [2**29, 4],
                                    "data_offsets": [0, 2**33]}}).encode()  # fmt: skip
    giant = len(header).to_bytes(8, "little") + header
    nan = good[:-4] + np.float32("nan").tobytes()
    for content, message in [
        (good[:-5], "ends at byte"),
        (giant, "ends at byte"),
        ((2**31).to_bytes(8, "little"), "header cannot be read"),
        (b"\x80\x04K\x01.", "header cannot be read"),  # a pickle
        (nan, "not finite"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            read_artefact(damaged(contents[0], prompt_safetensors=content), "spam")
        assert "spam" in str(error.value) and "/tmp" not in str(error.value)


def test_files_that_are_no_prompts_are_refused(contents, monkeypatch):
    with pytest.raises(UserError, match=r"'\.\./x' is no file of a prompt"):
        artefacts.check_files({**contents[0], "../x": b""})
    with pytest.raises(UserError, match="a prompt has prompt.json"):
        artefacts.check_files({"prompt.json": b"{}"})
    with pytest.raises(UserError, match="a prompt may have 10"):
        artefacts.check_files(contents[0], max_bytes=10)
