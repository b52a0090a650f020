"""The catalogue: what names mean while prompts are added, replaced, removed and damaged."""

import gc
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.methods.tuned import Prompt
from jaxprompt.serving.artefacts import digest_of, files_of, read_artefact
from jaxprompt.serving.catalogue import EVERY_TENANT, Catalogue, Conflict, FailedPrompt
from jaxprompt.serving.store import (
    DirectoryStore,
    PathStore,
    ReadOnlyStore,
    StoreUnavailable,
    UnknownPrompt,
)
from jaxprompt.serving.version import Version


def files_for(value: float, length: int = 2) -> dict[str, bytes]:
    return files_of(Prompt(np.full((length, 4), value, np.float32), {}))


CONTENTS = [files_for(value) for value in range(4)]
DAMAGED = {**CONTENTS[0], "prompt.safetensors": b"\0" * 9}


class Gate:
    """Makes versions, counts them, and can hold back the names that tests tell it."""

    def __init__(self):
        self.made, self.held, self.open = [], set(), threading.Event()

    def __call__(self, candidate):
        if candidate.name in self.held:
            assert self.open.wait(5)
        prompt = read_artefact(candidate.files, candidate.name)
        if len(prompt.vectors) > 8:
            raise UserError("The prompt has more than 8 vectors; start with --prompt-length.")
        self.made.append(candidate.name)
        return Version(candidate.name, candidate.tenant, candidate.digest, 0, prompt)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path)


@pytest.fixture
def catalogue(store, gate):
    opened = Catalogue([store], gate)
    yield opened
    gate.open.set()
    opened.close()


def now(catalogue, reference, tenant=EVERY_TENANT):
    return catalogue.resolve(reference, tenant).result(5)


def value_of(version):
    return version.prompt.vectors[0, 0]


def eventually(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- reading


def test_prompts_are_listed_without_being_read_and_read_when_asked_for(catalogue, store, gate):
    for name in ("b", "a", "acme/c"):
        store.write(name, CONTENTS[1])
    catalogue.scan()
    assert [facts.name for facts in catalogue.list(EVERY_TENANT)] == ["a", "acme/c", "b"]
    assert {facts.state for facts in catalogue.list(EVERY_TENANT)} == {"stored"}
    assert gate.made == []
    version = now(catalogue, "a")
    assert (version.number, version.digest) == (1, digest_of(CONTENTS[1]))
    assert catalogue.facts("a").state == "ready" and gate.made == ["a"]
    assert catalogue.resolve("a").done() and now(catalogue, "a") is version


def test_pages_follow_one_another(catalogue, store):
    for number in range(7):
        store.write(f"p{number}", CONTENTS[0])
    catalogue.scan()
    pages, after = [], None
    while page := catalogue.list(limit=3, after=after):
        pages.append([facts.name for facts in page])
        after = page[-1].name
    assert pages == [["p0", "p1", "p2"], ["p3", "p4", "p5"], ["p6"]]


def test_a_tenant_sees_its_own_and_public_prompts_only(catalogue):
    catalogue.put("spam", CONTENTS[0])
    catalogue.put("spam", CONTENTS[1], "acme")
    catalogue.put("secret", CONTENTS[2], "other")
    assert value_of(now(catalogue, "spam", None)) == 0
    assert value_of(now(catalogue, "spam", "acme")) == 1  # hides the public one
    assert now(catalogue, "spam", "acme").tenant == "acme"
    assert value_of(now(catalogue, "acme/spam", "acme")) == 1
    for reference in ("secret", "other/secret"):
        for tenant in (None, "acme"):
            with pytest.raises(UnknownPrompt):
                catalogue.resolve(reference, tenant)
    assert [facts.name for facts in catalogue.list("acme")] == ["acme/spam", "spam"]
    assert value_of(now(catalogue, "other/secret", EVERY_TENANT)) == 2
    with pytest.raises(UnknownPrompt):
        catalogue.put("other/secret", CONTENTS[0], "acme")
    with pytest.raises(UnknownPrompt):
        catalogue.remove("spam", "other")


def test_versions_are_named_by_number_and_by_digest(catalogue):
    first, second = catalogue.put("spam", CONTENTS[1]), catalogue.put("spam", CONTENTS[2])
    assert (first.number, second.number) == (1, 2)
    assert now(catalogue, "spam") is second and now(catalogue, "spam@2") is second
    assert now(catalogue, "spam@1") is first
    assert now(catalogue, f"spam@sha256:{first.digest}") is first
    for reference in ("spam@3", "spam@0", "spam@x", "spam@sha256:00", "spam@"):
        with pytest.raises(UnknownPrompt, match="There is no version"):
            catalogue.resolve(reference)
    with pytest.raises(UnknownPrompt):
        now(catalogue, f"spam@sha256:{'0' * 64}")
    assert catalogue.put("spam", CONTENTS[2]) is second  # the same content is the same version


def test_a_prompt_that_is_slow_to_load_holds_back_no_other(catalogue, store, gate):
    for name in ("warm", "cold"):
        store.write(name, CONTENTS[0])
    catalogue.scan()
    now(catalogue, "warm")
    gate.held.add("cold")
    waiting = [catalogue.resolve("cold") for _ in range(20)]
    assert catalogue.facts("cold").state == "loading" and not waiting[0].done()
    assert catalogue.resolve("warm").done()
    gate.open.set()
    assert len({id(future.result(5)) for future in waiting}) == 1 and gate.made.count("cold") == 1


def test_memory_holds_what_was_used_lately(store, gate):
    size = 100 * 4 * 4 + 4096
    contents = files_for(1.0, 8)
    catalogue = Catalogue([store], gate, max_bytes=3 * (8 * 4 * 4 + 4096))
    for name in "abcd":
        store.write(name, contents)
    catalogue.scan()
    for name in "abcad":  # b is the least recently used
        now(catalogue, name)
    assert catalogue.in_memory[0] == 3 and catalogue.in_memory[1] < 3 * size
    gc.collect()
    assert [catalogue.loaded(name) is not None for name in "abcd"] == [True, False, True, True]
    assert now(catalogue, "b").number == 1 and gate.made.count("b") == 2  # read again
    catalogue.close()


def test_a_version_that_somebody_holds_is_not_read_twice(store, gate):
    catalogue = Catalogue([store], gate, max_bytes=1)
    store.write("a", CONTENTS[0])
    store.write("b", CONTENTS[0])
    catalogue.scan()
    held = now(catalogue, "a")
    now(catalogue, "b")
    assert now(catalogue, "a") is held and gate.made.count("a") == 1
    catalogue.close()


# ---- changing


def test_requests_keep_the_version_that_they_were_admitted_with(catalogue):
    first = catalogue.put("spam", CONTENTS[1])
    catalogue.put("spam", CONTENTS[2])
    catalogue.remove("spam")
    assert value_of(first) == 1
    with pytest.raises(UnknownPrompt):
        catalogue.resolve("spam")
    assert catalogue.put("spam", CONTENTS[1]).number == 3  # no number means two things
    assert catalogue.in_memory[0] == 1


def test_nothing_is_kept_of_names_that_are_gone_and_no_number_comes_back(catalogue):
    numbers = []
    for turn in range(6):
        name = f"p{turn % 3}"
        numbers += [(name, catalogue.put(name, files).number) for files in CONTENTS[:2]]
        catalogue.remove(name)
    assert len(set(numbers)) == len(numbers)
    held = [value for value in vars(catalogue).values() if hasattr(value, "__len__")]
    assert not any(map(len, held[1:])), held  # the first are the stores


def test_a_put_that_a_load_overtakes_has_a_number_of_its_own(catalogue, store, monkeypatch):
    store.write("spam", CONTENTS[1])
    catalogue.scan()
    write = store.write
    monkeypatch.setattr(store, "write", lambda *given: now(catalogue, "spam") and write(*given))
    assert catalogue.put("spam", CONTENTS[2]).number == 2
    assert [value_of(now(catalogue, f"spam@{number}")) for number in (1, 2)] == [1, 2]


def test_content_that_does_not_fit_changes_nothing(catalogue, store):
    catalogue.put("spam", CONTENTS[1])
    for files, message in ((DAMAGED, "header"), (files_for(1.0, 9), "--prompt-length")):
        with pytest.raises(UserError, match=message):
            catalogue.put("spam", files)
    assert value_of(now(catalogue, "spam")) == 1 and store.read("spam") == CONTENTS[1]


def test_changes_can_be_made_for_one_version_only(catalogue):
    first = catalogue.put("spam", CONTENTS[1], create=True)
    with pytest.raises(Conflict, match="exists"):
        catalogue.put("spam", CONTENTS[2], create=True)
    with pytest.raises(Conflict, match="read it again"):
        catalogue.put("spam", CONTENTS[2], if_match=digest_of(CONTENTS[3]))
    catalogue.put("spam", CONTENTS[2], if_match=f"sha256:{first.digest}")
    with pytest.raises(Conflict):
        catalogue.remove("spam", if_match=first.digest)
    catalogue.remove("spam")


def test_new_prompts_go_to_the_store_that_can_be_written(tmp_path, gate):
    (tmp_path / "library").mkdir()
    library = DirectoryStore(tmp_path / "library")
    DirectoryStore(tmp_path).write("named", CONTENTS[1])
    named = PathStore({"named": tmp_path / "named"})
    library.write("named", CONTENTS[2])
    catalogue = Catalogue([named, library], gate)
    catalogue.scan()
    assert value_of(now(catalogue, "named")) == 1  # the first store that has it
    assert not catalogue.facts("named").writable
    with pytest.raises(ReadOnlyStore):
        catalogue.put("named", CONTENTS[0])
    catalogue.put("new", CONTENTS[3])
    assert set(library.list()) == {"named", "new"}
    with pytest.raises(ReadOnlyStore, match="--library"):
        Catalogue([named], gate).put("new", CONTENTS[0])
    catalogue.close()


def test_readers_never_see_half_of_a_thousand_replacements(catalogue):
    """Each reader sees numbers that only grow, and content that belongs to its number."""
    contents = [files_for(value) for value in range(10)]
    values = {digest_of(files): value for value, files in enumerate(contents)}
    store = catalogue._stores[0]
    store.write = lambda name, files: ""  # of a directory it would be the disk that is measured
    catalogue.put("spam", contents[0])
    done, seen = threading.Event(), [0]

    def read():
        last, count = 0, 0
        while not done.is_set():
            version = catalogue.resolve("spam").result(5)
            assert version.number >= last and value_of(version) == values[version.digest]
            last, count = version.number, count + 1
        return last, count

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        prompts = {digest_of(files): read_artefact(files, "spam") for files in contents}
        catalogue._make = lambda c: Version(c.name, c.tenant, c.digest, 0, prompts[c.digest])
        for turn in range(1, 1001):
            written = catalogue.put("spam", contents[turn % 10])
            assert catalogue.resolve("spam").result() is written  # visible when put returns
        done.set()
        seen = [reader.result(5) for reader in readers]
    assert written.number == 1001 and all(last > 0 for last, _ in seen)
    assert catalogue.in_memory[0] <= 10


def test_several_writers_of_one_name_end_with_what_the_store_has(catalogue, store):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda turn: catalogue.put("spam", CONTENTS[turn % 4]), range(24)))
    assert store.read("spam")["prompt.safetensors"] in [c["prompt.safetensors"] for c in CONTENTS]
    assert digest_of(store.read("spam")) == now(catalogue, "spam").digest


# ---- stores that change behind the server's back


def test_a_replaced_folder_is_noticed_and_the_old_version_answers_until_then(
    catalogue, store, gate
):
    catalogue.put("spam", CONTENTS[1])
    store.write("spam", CONTENTS[2])
    gate.held.add("spam")
    catalogue.scan()
    assert catalogue.facts("spam").state == "loading"
    assert value_of(now(catalogue, "spam")) == 1  # it answers while the new one is checked
    gate.open.set()
    eventually(lambda: value_of(now(catalogue, "spam")) == 2)
    assert now(catalogue, "spam").number == 2


def test_a_damaged_replacement_is_told_and_the_old_version_stays(catalogue, store):
    catalogue.put("spam", CONTENTS[1])
    store.write("spam", DAMAGED)
    catalogue.scan()
    eventually(lambda: catalogue.facts("spam").state == "failed")
    assert "header" in catalogue.facts("spam").reason
    assert value_of(now(catalogue, "spam")) == 1 and catalogue.load_failures == 1
    catalogue.scan()  # it is not read again and again
    assert catalogue.load_failures == 1
    store.write("spam", CONTENTS[3])
    catalogue.scan()
    eventually(lambda: catalogue.facts("spam").state == "ready")
    assert value_of(now(catalogue, "spam")) == 3


def test_a_prompt_that_was_never_good_says_why(catalogue, store):
    store.write("spam", DAMAGED)
    catalogue.scan()
    for _ in range(3):
        with pytest.raises(FailedPrompt, match="'spam' cannot be used: .*header"):
            now(catalogue, "spam")
    assert catalogue.load_failures == 1


def test_a_removed_folder_takes_its_name_away(catalogue, store, tmp_path):
    catalogue.put("spam", CONTENTS[1])
    shutil.rmtree(tmp_path / "spam")
    catalogue.scan()
    with pytest.raises(UnknownPrompt):
        catalogue.resolve("spam")
    assert len(catalogue) == 0 and catalogue.in_memory == (0, 0)


def test_a_store_that_does_not_answer_changes_nothing_and_is_asked_again(
    catalogue, store, monkeypatch
):
    catalogue.put("spam", CONTENTS[1])
    store.write("new", CONTENTS[2])
    catalogue.scan()
    with monkeypatch.context() as broken:

        def down(*args):
            raise StoreUnavailable("The store is down.")

        broken.setattr(store, "list", down)
        broken.setattr(store, "read", down)
        catalogue.scan()
        assert catalogue.store_errors == {0: "The store is down."}
        assert value_of(now(catalogue, "spam")) == 1  # what is warm goes on
        with pytest.raises(StoreUnavailable):
            now(catalogue, "new")
    assert value_of(now(catalogue, "new")) == 2
    catalogue.scan()
    assert catalogue.store_errors == {}


def test_a_change_made_here_is_newer_than_a_listing_that_began_before(
    catalogue, store, monkeypatch
):
    catalogue.put("kept", CONTENTS[1])
    catalogue.put("removed", CONTENTS[1])
    listed = store.list

    def slow():
        before = listed()
        catalogue.put("kept", CONTENTS[2])
        catalogue.put("added", CONTENTS[2])
        catalogue.remove("removed")
        monkeypatch.setattr(store, "list", listed)
        return before

    monkeypatch.setattr(store, "list", slow)
    catalogue.scan()
    assert [facts.name for facts in catalogue.list()] == ["added", "kept"]
    assert value_of(now(catalogue, "kept")) == 2
    catalogue.scan()
    assert now(catalogue, "kept").number == 2


def test_a_watched_store_needs_no_call(store, gate):
    store.interval = 0.01
    catalogue = Catalogue([store], gate)
    catalogue.watch()
    store.write("spam", CONTENTS[1])
    eventually(lambda: len(catalogue) == 1)
    assert value_of(now(catalogue, "spam")) == 1
    catalogue.close()


def test_adding_and_replacing_take_as_long_with_ten_thousand_names(store, gate):
    catalogue = Catalogue([store], gate)
    store.list = lambda: {f"p{number}": "" for number in range(10_000)}
    catalogue.scan()
    assert len(catalogue) == 10_000
    begun = time.monotonic()
    for turn in range(4):
        catalogue.put("p77", CONTENTS[turn])
    assert time.monotonic() - begun < 0.5
    assert [facts.name for facts in catalogue.list(limit=2, after="p9998")] == ["p9999"]
    catalogue.close()
