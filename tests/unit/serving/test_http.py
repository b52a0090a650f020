"""The routes over ASGI, with an engine that makes its answers up."""

import asyncio
import hashlib
import json
import shutil
import time
from typing import NamedTuple

import pytest
import uvicorn
from helpers_serving import (
    TASK,
    FailingFiles,
    Running,
    error_of,
    events_of,
    prompt_folder,
)

from jaxprompt.config import yaml12
from jaxprompt.config.schema import RunConfig
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.methods.user_library import UserLibrary
from jaxprompt.serving.fair_queue import Limits
from jaxprompt.serving.http.keys import PUBLIC, Keys
from jaxprompt.serving.http.openapi import openapi
from jaxprompt.serving.http.server import bind
from jaxprompt.serving.http.service import HttpLimits
from jaxprompt.serving.store import open_store


@pytest.fixture
def running(tmp_path):
    return Running(tmp_path)


def ask(running, *requests, limits=Limits(), **headers):
    """The answers of requests (method, path, keyword arguments), one after another."""

    async def all_of_them():
        async with running.client(limits, **headers) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(all_of_them())


def post(path, **body):
    return "POST", path, {"json": body}


def test_rows_are_answered_in_order_with_the_version_that_answered(running):
    [found, mixed] = ask(
        running,
        post("/v1/predict", prompt="first", inputs=[{"text": "it was good"}, "bad"]),
        post("/v1/predict", prompt=["second", "first"], inputs=["a", "b"], top_k=1),
    )
    body = found.json()
    assert [one["prediction"] for one in body["predictions"]] == ["yes", "yes"]
    first = body["predictions"][0]
    assert [score["label"] for score in first["scores"]] == ["yes", "no"]
    assert first["scores"][0]["log_likelihood"] == -1.0
    assert sum(score["probability"] for score in first["scores"]) == pytest.approx(1)
    assert (first["prompt"], first["version"], len(first["digest"])) == ("first", 1, 64)
    assert body["usage"]["virtual_tokens"] == 4
    assert "queue;dur=" in found.headers["server-timing"]
    both = mixed.json()["predictions"]
    assert [one["prediction"] for one in both] == ["no", "yes"]
    assert [one["prompt"] for one in both] == ["second", "first"]
    assert [len(one["scores"]) for one in both] == [1, 1]


def test_labels_are_calibrated_by_rows_that_say_nothing_or_by_the_rows_of_a_request(tmp_path):
    for name in ("content_free", "batch"):
        prompt_folder(tmp_path / "library" / name, 0, TASK | {"calibration": name})
    running = Running(tmp_path)
    free, again, few, many = ask(
        running,
        post("/v1/predict", prompt=["content_free", "first"], inputs=["a", "b"]),
        post("/v1/predict", prompt="content_free", inputs=["a"]),
        post("/v1/predict", prompt="batch", inputs=["a"] * 7),
        post("/v1/predict", prompt="batch", inputs=["a"] * 8),
    )
    # the engine answers to nothing what it answers to all rows
    calibrated, plain = free.json()["predictions"]
    assert [score["probability"] for score in calibrated["scores"]] == pytest.approx([0.5, 0.5])
    assert plain["scores"][0]["log_likelihood"] == -1.0
    assert sum(map(len, running.engine.batches)) == (2 + 3) + 1 + 8
    assert again.json()["predictions"][0]["scores"] == calibrated["scores"]
    assert error_of(few) == (400, "invalid_value")
    assert "7 are fewer than 8; ask more together" in few.json()["error"]["message"]
    scores = many.json()["predictions"][7]["scores"]
    assert [score["probability"] for score in scores] == pytest.approx([0.5, 0.5])


def test_one_request_may_have_other_words_and_they_take_the_slot_of_the_prompt(running):
    words = {"template": "[prompt] it was {text}", "labels": ["good", "bad"]}
    changed, bare, same, plain = ask(
        running,
        post("/v1/predict", prompt="second", inputs=["one"], wording=words),
        post("/v1/predict", prompt="second", inputs=["one"], wording=words, bare=True),
        post("/v1/predict", prompt="second", inputs=["one"], wording={}),
        post("/v1/predict", prompt="second", inputs=["one"]),
    )
    found = changed.json()["predictions"][0]
    assert (found["prediction"], found["prompt"], found["version"]) == ("bad", "second", 1)
    assert [score["label"] for score in found["scores"]] == ["good", "bad"]
    assert bare.json()["predictions"][0]["prediction"] == "good"
    drop = lambda one: {key: x for key, x in one.json().items() if key != "timing"}
    assert drop(same) == drop(plain)
    works = [work for batch in running.engine.batches for work in batch]
    assert len({work.version for work in works if work.version is not None}) == 1
    assert len(works[0].example.inputs) == len(works[2].example.inputs)  # question : and it was


def test_words_are_kept_as_a_config_that_names_no_path_of_the_server(running):
    words = {"template": "it was {text}", "labels": ["good", "bad"]}
    kept, wrong = ask(
        running,
        post("/v1/prompts/first/config", wording=words),
        post("/v1/prompts/first/config", wording={"labels": ["good", "good"]}),
    )
    values = yaml12.load(kept.text)
    assert resolve_task(values["task"]).template == "it was {text}"
    assert values["task"]["labels"] == ["good", "bad"] and values["output"] == "runs/kept"
    assert kept.headers["content-type"].startswith("application/yaml")
    assert error_of(wrong) == (400, "invalid_value")


def test_rows_of_one_batch_are_not_counted_as_batches_one_after_another(running):
    run = running.engine.run
    running.engine.run = lambda batch: time.sleep(0.01) or run(batch)
    one = ask(running, post("/v1/predict", prompt="first", inputs=["a"] * 64))[0]
    timing = one.json()["timing"]
    assert 10 <= timing["device_ms"] <= timing["total_ms"]


def test_the_backbone_answers_a_task_alone_only_where_it_is_asked_to(running):
    bare, unknown, backbone = ask(
        running,
        post("/v1/predict", prompt="second", inputs=["a"], bare=True),
        post("/v1/predict", prompt="nobody", inputs=["a"]),
        post("/v1/predict", prompt="tiny", inputs=["a"]),
    )
    answer = bare.json()["predictions"][0]
    assert (answer["prediction"], answer["prompt"], answer["version"]) == ("yes", "tiny", None)
    assert running.engine.batches[0][0].version is None
    assert error_of(unknown) == (404, "model_not_found")
    assert error_of(backbone) == (400, "invalid_value")


def test_targets_are_scored_as_the_command_does(running):
    [found] = ask(
        running,
        post("/v1/score", prompt="first", inputs=[{"input": "it was", "target": "good bad"}]),
    )
    assert found.json()["scores"][0] | {"digest": 0} == {
        "log_likelihood": -3.0, "tokens": 3, "prompt": "first", "version": 1, "digest": 0
    }  # fmt: skip


WRONG = [
    (("POST", "/v1/predict", {"content": b"{"}), (400, "invalid_json")),
    (("POST", "/v1/predict", {"content": b"[" * 100_000}), (400, "invalid_json")),
    (post("/v1/predict", prompt="first"), (400, "invalid_value")),
    (post("/v1/predict", prompt="first", inputs=[]), (400, "invalid_value")),
    (post("/v1/predict", prompt="first", inputs=["a"], tok_k=3), (400, "invalid_value")),
    (post("/v1/predict", prompt="first", inputs=[{"title": "a"}]), (400, "invalid_value")),
    (
        ("POST", "/v1/predict", {"content": rb'{"prompt": "first", "inputs": ["\ud800"]}'}),
        (400, "invalid_value"),
    ),
    (post("/v1/predict", prompt=["first"], inputs=["a", "b"]), (400, "invalid_value")),
    (post("/v1/predict", inputs=["a"]), (400, "no_prompt")),
    (post("/v1/predict", user="a", inputs=["a"]), (400, "no_users")),
    *(
        (post("/v1/predict", prompt="first", inputs=["a"], wording=wording), (400, "invalid_value"))
        for wording in (
            {"template": "no column"},
            {"template": "{text"},
            {"template": "{other} {text}"},
            {"template": "[prompt:9] {text}"},
            {"template": "x" * 2001},
            {"labels": ["yes"]},
            {"labels": ["yes", "no"] * 40},
            {"labels": ["y" * 201, "no"]},
            {"words": 1},
            {"template": "promptsource:/dev/zero#a {text}"},
        )
    ),
    (
        post("/v1/predict", prompt=["first"], inputs=["a"], wording={"labels": ["good", "bad"]}),
        (400, "invalid_value"),
    ),
    (post("/v1/predict", prompt="../first", inputs=["a"]), (404, "model_not_found")),
    (post("/v1/predict", prompt="first@7", inputs=["a"]), (404, "model_not_found")),
    (post("/v1/predict", prompt="first", inputs=["a"] * 300), (413, "too_large")),
    (("POST", "/v1/predict", {"content": b"x" * 2_000_000}), (413, "too_large")),
    (post("/v1/completions", model="first", prompt=[1, 64]), (400, "invalid_value")),
    (post("/v1/completions", model="first", prompt=[1, 20]), (400, "invalid_value")),
    (post("/v1/completions", model="first", prompt=[-1]), (400, "invalid_value")),
    (post("/v1/completions", model="first", prompt=[]), (400, "invalid_value")),
    (post("/v1/completions", model="first", prompt=[[3] * 50]), (413, "too_large")),
    (post("/v1/completions", model="first", prompt="a", echo=True), (400, "echo_unsupported")),
    (post("/v1/completions", model="first", prompt="a", max_tokens=0), (400, "invalid_value")),
    (("GET", "/v1/predict", {}), (405, "method_not_allowed")),
    (("GET", "/nowhere", {}), (404, "not_found")),
    (("GET", "/v1/prompts/nobody", {}), (404, "model_not_found")),
    (("GET", "/v1/prompts?limit=many", {}), (400, "invalid_value")),
    (("DELETE", "/v1/prompts/nobody", {}), (404, "model_not_found")),
    (post("/detokenize", tokens=[99]), (400, "invalid_value")),
    (post("/v1/load_lora_adapter", lora_name="a", lora_path="/etc"), (403, "source_not_allowed")),
    (post("/v1/load_lora_adapter", lora_name="a", lora_path="a\0"), (400, "invalid_value")),
    (("PUT", "/v1/prompts/a", {"json": {"source": "a\0"}}), (400, "invalid_value")),
]


def test_a_mistake_is_one_sentence_with_its_status(running):
    for request, wanted in zip(WRONG, ask(running, *(one for one, _ in WRONG)), strict=True):
        assert error_of(wanted) == request[1], (request, wanted.text)
        message = wanted.json()["error"]["message"]
        assert message.endswith(".") and len(wanted.headers["x-request-id"]) == 32
    assert not running.engine.batches


def test_text_is_generated_streamed_stopped_and_repeated(running):
    body = {"model": "first", "prompt": "good", "max_tokens": 7, "temperature": 0}
    whole, short, stopped, several, streamed, ignored = ask(
        running,
        post("/v1/completions", **body),
        post("/v1/completions", **body | {"max_tokens": 3}),
        post("/v1/completions", **body, stop=["no"]),
        post("/v1/completions", **body | {"prompt": [[4], [4, 5]], "n": 2, "seed": 3}),
        post("/v1/completions", **body, stream=True, stream_options={"include_usage": True}),
        post("/v1/completions", **body, best_of=3),
    )
    text = whole.json()["choices"][0]
    assert text["text"] == "bad yes no True False one" and text["finish_reason"] == "stop"
    assert whole.json()["model"] == "first" and whole.json()["version"] == 1
    assert short.json()["choices"][0]["text"] == "bad yes no"
    assert short.json()["choices"][0]["finish_reason"] == "length"
    assert stopped.json()["choices"][0] | {"logprobs": 0} == {
        "index": 0, "text": "bad yes ", "finish_reason": "stop", "logprobs": 0
    }  # fmt: skip
    assert [choice["index"] for choice in several.json()["choices"]] == [0, 1, 2, 3]
    assert several.json()["usage"]["prompt_tokens"] == 2 + 3
    events = events_of(streamed.text)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert len(events) == 4 and events[-1]["usage"]["completion_tokens"] == 6
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == text["text"]
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None, None, "stop"]
    assert ignored.headers["x-jaxprompt-ignored"] == "best_of"


def test_an_echo_has_one_likelihood_a_token_and_one_token_more(tmp_path):
    """As lm-evaluation-harness asks: it reads all entries but the last, and looks for the best."""
    running = Running(tmp_path, one_sequence=True)
    ask_of = {"model": "first", "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    found, alone, more = ask(
        running,
        post("/v1/completions", **ask_of, prompt=[[4, 5, 6], [7, 8]], max_tokens=1),
        post("/v1/completions", **ask_of, prompt="good bad", max_tokens=0),
        post("/v1/completions", **ask_of, prompt="good", max_tokens=4, stream=True),
    )
    first, second = found.json()["choices"]
    logprobs = first["logprobs"]
    assert len(logprobs["token_logprobs"]) == 4 and len(second["logprobs"]["tokens"]) == 3
    for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert value == max(top.values())
    assert first["text"].startswith("question : passage")
    assert len(alone.json()["choices"][0]["logprobs"]["tokens"]) == 2
    assert alone.json()["choices"][0]["text"] == "good bad"
    events = events_of(more.text)
    told = [token for e in events for token in e["choices"][0]["logprobs"]["tokens"]]
    assert len(told) == 1 + 4 and events[0]["choices"][0]["text"].startswith("good")


def test_prompts_are_put_described_replaced_and_removed(running, tmp_path):
    folder = prompt_folder(tmp_path / "new", 1)
    files = [("files", (p.name, p.read_bytes())) for p in sorted(folder.iterdir())]
    others = uploaded(prompt_folder(tmp_path / "other", 0))
    bad = [("files", ("prompt.safetensors", b"x")), ("files", ("prompt.json", b"{}"))]
    path, row = "/v1/prompts/new", post("/v1/predict", prompt="new", inputs=["a"])
    put, got, again, taken, stale, row1, replaced, row2, old, broken, gone, row3 = ask(
        running,
        ("PUT", path, {"files": files}),
        ("GET", path, {}),
        ("PUT", path, {"files": files}),
        ("PUT", path, {"files": others, "headers": {"if-none-match": "*"}}),
        ("PUT", path, {"files": others, "headers": {"if-match": '"0"'}}),
        row,
        ("PUT", path, {"files": others}),
        row,
        post("/v1/predict", prompt="new@1", inputs=["a"]),
        ("PUT", path, {"files": bad}),
        ("DELETE", path, {}),
        row,
    )
    assert (put.status_code, again.status_code, replaced.status_code) == (201, 200, 200)
    facts = got.json()
    assert facts["columns"] == ["text"] and facts["labels"] == TASK["labels"]
    assert facts["length"] == 2 and facts["metadata"]["task"] == TASK
    assert got.headers["etag"] == f'"{facts["digest"]}"'
    assert error_of(taken) == (409, "already_exists")
    assert error_of(stale) == (412, "version_conflict")
    answers = [one.json()["predictions"][0] for one in (row1, row2, old)]
    assert [one["prediction"] for one in answers] == ["no", "yes", "no"]
    assert [one["version"] for one in answers] == [1, 2, 1]
    assert error_of(broken) == (422, "prompt_rejected")
    assert gone.status_code == 204 and error_of(row3) == (404, "model_not_found")
    assert not (running.library / "new").exists()


def test_prompts_are_listed_in_pages_inspected_and_pinned(running):
    models, page, rest, found, inspected, pinned, unpinned = ask(
        running,
        ("GET", "/v1/models", {}),
        ("GET", "/v1/prompts?limit=2", {}),
        ("GET", "/v1/prompts?limit=2&after=first", {}),
        ("GET", "/v1/prompts?search=sec", {}),
        ("GET", "/v1/prompts/first/inspect", {}),
        ("POST", "/v1/prompts/first/pin", {"json": {"pinned": True}}),
        ("POST", "/v1/prompts/first/pin", {"json": {"pinned": False}}),
    )
    assert [one["id"] for one in models.json()["data"]] == ["tiny", "acme/own", "first", "second"]
    assert models.json()["data"][2]["parent"] == "tiny"
    names = lambda answer: [one["name"] for one in answer.json()["data"]]
    assert names(page) == ["acme/own", "first"] and page.json()["has_more"]
    assert names(rest) == ["second"] and not rest.json()["has_more"]
    assert names(found) == ["second"]
    assert inspected.json()["length"] == 2 and inspected.json()["prompt"] == "first"
    assert inspected.json()["prompts"]["names"] == ["first"]
    assert (pinned.json()["state"], pinned.json()["pinned"]) == ("device", True)
    assert (unpinned.json()["state"], unpinned.json()["pinned"]) == ("host", False)


def test_a_full_disk_is_told_and_is_no_fault_of_the_server(running, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running.catalogue, "put", full)
    files = uploaded(prompt_folder(tmp_path / "new", 1))
    [put] = ask(running, ("PUT", "/v1/prompts/new", {"files": files}))
    assert error_of(put) == (503, "store_unavailable") and "No space left" in put.text


def uploaded(folder):
    """The files of a prompt, as a form has them."""
    return [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


def test_whatever_a_store_raises_is_a_sentence_with_a_status(tmp_path):
    store = open_store(f"memory://{tmp_path.name}/prompts")
    folder = prompt_folder(tmp_path / "made")
    for name in ("first", "cold"):
        store.write(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    running = Running(tmp_path, store=store)
    failing = store._fs = FailingFiles(store._fs)
    reads = [post("/v1/predict", prompt="cold", inputs=["a"]), ("GET", "/v1/prompts/cold", {})]
    writes = [("PUT", "/v1/prompts/new", {"files": uploaded(folder)}),
              ("DELETE", "/v1/prompts/cold", {})]  # fmt: skip
    errors = [
        ConnectionError("no route to host"), TimeoutError(), OSError(28, "No space left"),
        RuntimeError("of a library"), KeyError("Bucket"), PermissionError(13, "denied"),
    ]  # fmt: skip

    async def story():
        found = {}
        async with running.client() as client:
            warm = lambda: client.post("/v1/predict", json={"prompt": "first", "inputs": ["a"]})
            assert (await warm()).status_code == 200
            for error in errors:
                failing.error = error
                running.catalogue.scan()
                answers = [await client.request(m, p, **more) for m, p, more in reads + writes]
                found[type(error)] = answers
                assert (await warm()).status_code == 200
            failing.error = None
            method, path, more = reads[0]
            assert (await client.request(method, path, **more)).status_code == 200
        return found

    for kind, answers in asyncio.run(story()).items():
        unavailable, refused = (503, "store_unavailable"), (409, "read_only")
        of_writes = refused if kind is PermissionError else unavailable
        assert [error_of(each) for each in answers] == [unavailable] * 2 + [of_writes] * 2
        assert all("The store memory:" in each.json()["error"]["message"] for each in answers)


def test_a_pin_goes_along_with_its_name_however_that_changes(running, tmp_path):
    files = uploaded(prompt_folder(tmp_path / "other", 1))
    pinned, service = running.service.device.pinned, running.service

    async def change():
        async with running.client() as client:
            for name in ("first", "second"):
                await client.post(f"/v1/prompts/{name}/pin", json={"pinned": True})
                await client.post("/v1/predict", json={"prompt": name, "inputs": ["a"]})
            replaced = await client.put("/v1/prompts/first", files=files)
            assert replaced.json()["pinned"]
            shutil.rmtree(running.library / "second")  # by somebody else
            running.catalogue.scan()
            service.batcher.call(lambda: None).result(20)
            assert {f"{one.name}@{one.number}" for one in pinned} == {"first@2"}
            assert set(service.used) == {"first"}
            await client.delete("/v1/prompts/first")
            service.batcher.call(lambda: None).result(20)
            assert not pinned and not service.pinned and not service.used

    asyncio.run(change())


def test_adapters_are_loaded_by_vllms_routes_from_folders_that_are_allowed(running, tmp_path):
    running.service.sources = [str(tmp_path / "allowed")]
    place = str(prompt_folder(tmp_path / "allowed" / "p", 1))
    load = post("/v1/load_lora_adapter", lora_name="added", lora_path=place)
    loaded, twice, answer, unloaded, form = ask(
        running,
        load,
        load,
        post("/v1/completions", model="added", prompt="a"),
        post("/v1/unload_lora_adapter", lora_name="added"),
        ("POST", "/v1/load_lora_adapter", {"content": json.dumps(load[2]["json"])}),
    )
    assert loaded.status_code == 200 and loaded.text.startswith("Success")
    assert error_of(twice) == (409, "already_exists")
    assert answer.json()["digest"] and unloaded.status_code == 200
    assert error_of(form) == (400, "invalid_json")


def write_keys(path, **entries):
    digest = lambda key: hashlib.sha256(key.encode()).hexdigest()
    path.write_text(json.dumps({digest(key): entry for key, entry in entries.items()}))
    return Keys(path)


def test_keys_say_who_sees_what_and_who_may_change_it(running, tmp_path):
    running.service.keys = write_keys(
        tmp_path / "keys.json",
        acme={"tenant": "acme", "scopes": ["predict", "manage"]},
        other={"tenant": "other", "limits": {"rows_per_minute": 3}},
    )
    running.service.anyone = None
    as_key = lambda key: {"headers": {"authorization": f"Bearer {key}"}}
    row = {"json": {"prompt": "own", "inputs": ["a"]}}
    none, wrong, own, other, listed, refused, new, limit, open_to_all = ask(
        running,
        ("POST", "/v1/predict", row),
        ("POST", "/v1/predict", row | as_key("nobody")),
        ("POST", "/v1/predict", row | as_key("acme")),
        ("POST", "/v1/predict", row | as_key("other")),
        ("GET", "/v1/models", as_key("other")),
        ("DELETE", "/v1/prompts/first", as_key("other")),
        ("DELETE", "/v1/prompts/first", as_key("acme")),
        (
            "POST",
            "/v1/predict",
            {"json": {"prompt": "first", "inputs": ["a"] * 5}} | as_key("other"),
        ),  # fmt: skip
        ("GET", "/ready", {}),
    )
    assert error_of(none) == (401, "invalid_api_key") and none.headers["www-authenticate"]
    assert error_of(wrong) == (401, "invalid_api_key")
    assert own.json()["predictions"][0]["prompt"] == "acme/own"
    assert error_of(other) == (404, "model_not_found")
    assert [one["id"] for one in listed.json()["data"]] == ["tiny", "first", "second"]
    assert error_of(refused) == (403, "missing_scope")
    assert error_of(new) == (404, "model_not_found"), "a tenant changes no public prompt"
    assert limit.status_code == 200 and open_to_all.status_code == 200


def test_a_key_that_has_used_its_rows_waits(running, tmp_path):
    running.service.keys = write_keys(tmp_path / "keys.json", k={"limits": {"rows_per_minute": 60}})
    body = post("/v1/predict", prompt="first", inputs=["a"] * 60)
    first, second = ask(running, body, body, authorization="Bearer k")
    assert first.status_code == 200 and error_of(second) == (429, "key_limit")
    assert 50 <= int(second.headers["retry-after"]) <= 60


def test_without_keys_nobody_manages_from_afar_and_no_web_page_asks(running):
    running.service.anyone = PUBLIC
    [refused] = ask(running, ("DELETE", "/v1/prompts/first", {}))
    assert error_of(refused) == (403, "missing_scope")
    again = Running(running.library.parent)
    again.service.hosts = ("127.0.0.1", "localhost", "::1")
    rebound, page, same = ask(
        again,
        ("GET", "/v1/models", {"headers": {"host": "evil.example"}}),
        ("GET", "/v1/models", {"headers": {"origin": "http://evil.example"}}),
        ("GET", "/v1/models", {"headers": {"origin": "http://127.0.0.1:8000"}}),
    )
    assert error_of(rebound) == (421, "wrong_host") and error_of(page) == (403, "wrong_origin")
    assert same.status_code == 200


def test_a_full_queue_a_deadline_and_a_failing_device_have_their_statuses(running):
    async def story():
        row = {"prompt": "first", "inputs": ["a"]}
        async with running.client(Limits(queued_rows=2, batch_rows=1, row_sizes=(1,))) as client:
            running.engine.gate.clear()
            held = asyncio.create_task(client.post("/v1/predict", json=row))
            await asyncio.to_thread(running.engine.entered.wait, 20)
            late = await client.post("/v1/predict", json=row | {"timeout_ms": 20})
            waiting = asyncio.create_task(client.post("/v1/predict", json=row))
            await asyncio.sleep(0.02)
            full = await client.post("/v1/predict", json=row | {"inputs": ["a"] * 2})
            running.engine.gate.set()
            answers = [await held, await waiting]
            running.engine.error = RuntimeError("on fire")
            broken = await client.post("/v1/predict", json=row)
            running.engine.error = None
            figures = await client.get("/metrics")
            return late, full, answers, broken, figures

    late, full, answers, broken, figures = asyncio.run(story())
    assert error_of(late) == (504, "deadline_exceeded")
    assert error_of(full) == (503, "overloaded") and int(full.headers["retry-after"]) >= 1
    assert [one.status_code for one in answers] == [200, 200]
    assert error_of(broken) == (500, "device_error")
    assert broken.headers["x-request-id"] in broken.json()["error"]["message"]
    assert 'jaxprompt_rejected_total{reason="overloaded"} 1.0' in figures.text


def test_scores_that_are_not_finite_are_an_error_of_their_request(running, tmp_path):
    prompt_folder(running.library / "broken", -1)
    running.catalogue.scan()
    bad, good = ask(
        running,
        post("/v1/predict", prompt="broken", inputs=["a"]),
        post("/v1/predict", prompt="first", inputs=["a"]),
    )
    assert error_of(bad) == (500, "non_finite_scores") and good.status_code == 200


class Choice(NamedTuple):
    """As ``library.Choice``."""

    prompt: str | None
    score: float
    margin: float
    candidates: list
    reason: str


class Nearest:
    """A router that chooses by the number of tokens, and abstains for long texts."""

    names = ("first", "gone", "second")

    def choose(self, features, candidates=None):
        chosen = None if len(features) > 3 else candidates[-1]
        return Choice(chosen, -0.5, 0.1, [(name, -1.0) for name in candidates], "")


def test_the_router_chooses_or_abstains(running):
    running.service.router = Nearest()
    routed, abstained, unknown = ask(
        running,
        post("/v1/predict", inputs=[{"text": "good"}], candidates=["first", "second"]),
        post("/v1/predict", inputs=[{"text": "it was good was it good"}]),
        post("/v1/predict", inputs=[{"text": "good"}], candidates=["first", "gone"]),
    )
    assert error_of(unknown) == (404, "model_not_found")
    answer = routed.json()["predictions"][0]
    assert answer["prompt"] == "second" and answer["routed"]["margin"] == 0.1
    assert error_of(abstained) == (422, "no_prompt_fits")


def test_a_user_is_answered_by_a_prompt_of_their_own_or_by_the_shared_one(running):
    config = RunConfig.model_construct()
    users = running.service.users = UserLibrary(running.library, "ab" * 32, config, 1)
    prompt_folder(users.shared_prompt, 0)
    prompt_folder(users.own_prompt("../4711"), 1)
    running.catalogue.scan()
    one, several, both, few = ask(
        running,
        post("/v1/predict", user="../4711", inputs=["a", "b"]),
        post("/v1/predict", user=["../4711", "nobody"], inputs=["a", "b"]),
        post("/v1/predict", user="../4711", prompt="first", inputs=["a"]),
        post("/v1/predict", user=["../4711"], inputs=["a", "b"]),
    )
    assert [each["prediction"] for each in one.json()["predictions"]] == ["no", "no"]
    assert [each["prompt"] for each in several.json()["predictions"]] == [
        users.name_of("../4711"), "shared"
    ]  # fmt: skip
    for wrong in (both, few):
        assert error_of(wrong) == (400, "invalid_value")
    assert "4711" not in json.dumps(several.json())


def test_the_tokenizer_is_told_as_harnesses_ask(running):
    info, ids, text = ask(
        running,
        ("GET", "/tokenizer_info", {}),
        post("/tokenize", prompt="it was good", add_special_tokens=False),
        post("/detokenize", tokens=[9, 10, 11]),
    )
    assert info.json()["eos_token"] == "</s>" and info.json()["size"] == 20
    assert ids.json() == {"tokens": [9, 10, 11], "count": 3}
    assert text.json() == {"prompt": "it was good"}


def test_health_readiness_and_figures_need_no_key(running, tmp_path):
    running.service.keys = write_keys(tmp_path / "keys.json", k={})
    health, ready, version, figures, schema = ask(
        running,
        *(
            ("GET", f"/{n}", {}) for n in ("health", "ready", "version", "metrics", "openapi.json")
        ),  # fmt: skip
    )
    assert health.json() == {"status": "ok"} and ready.json()["state"] == "ready"
    assert version.json()["backbone"] == "tiny" and b"jaxprompt_start_time" in figures.content
    assert schema.json() == json.loads(json.dumps(openapi()))


def test_a_client_that_goes_away_takes_its_rows_along(running):
    async def story():
        async with running.client(Limits(batch_rows=1, row_sizes=(1,))) as client:
            body = {"prompt": "first", "inputs": ["a"]}
            running.engine.gate.clear()
            held = asyncio.create_task(client.post("/v1/predict", json=body))
            await asyncio.to_thread(running.engine.entered.wait, 20)
            app = client._transport.app
            came, gone = asyncio.Queue(), asyncio.Event()
            content = json.dumps(body | {"inputs": ["b"] * 5}).encode()
            came.put_nowait({"type": "http.request", "body": content})
            scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": [],
                     "query_string": b"", "http_version": "1.1"}  # fmt: skip
            task = asyncio.create_task(app(scope, came.get, gone))
            while running.service.batcher.waiting < 5:
                await asyncio.sleep(0.001)
            came.put_nowait({"type": "http.disconnect"})
            await task
            assert running.service.batcher.waiting == 0
            running.engine.gate.set()
            return (await held).status_code

    assert asyncio.run(story()) == 200
    assert sum(map(len, running.engine.batches)) == 1


def test_rows_of_a_connection_that_closes_leave_the_queue_and_are_counted(running):
    """Over sockets, of a whole and of a streamed request."""
    rows = {"prompt": "first", "inputs": ["a"] * 3}
    stream = {"model": "first", "prompt": ["a", "b"], "stream": True}

    async def connected(port, path, body):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: me\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        return reader, writer

    async def until(condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)

    async def story():
        async with running.client(Limits(batch_rows=1, row_sizes=(1,))) as client:
            bound, batcher = bind("127.0.0.1", 0), running.service.batcher
            config = uvicorn.Config(client._transport.app, log_config=None, lifespan="off")
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve([bound]))
            await until(lambda: server.started)
            port = bound.getsockname()[1]
            running.engine.gate.clear()
            reader, held = await connected(port, "/v1/predict", rows | {"inputs": ["held"]})
            await asyncio.to_thread(running.engine.entered.wait, 20)
            away = [(await connected(port, "/v1/predict", rows))[1],
                    (await connected(port, "/v1/completions", stream))[1]]  # fmt: skip
            await until(lambda: batcher.waiting == 5)
            for writer in away:
                writer.close()
            await until(lambda: batcher.waiting == 0)
            running.engine.gate.set()
            status = await reader.readline()
            held.close()
            figures = await client.get("/metrics")
            server.should_exit = True
            await serving
            return status, figures.text

    status, figures = asyncio.run(story())
    assert status.startswith(b"HTTP/1.1 200")
    assert "jaxprompt_cancelled_rows_total 5.0" in figures
    assert sum(map(len, running.engine.batches)) == 1


def test_a_body_that_does_not_come_is_not_waited_for(running):
    running.service.limits = HttpLimits(body_seconds=0.02)

    async def slowly():
        yield b'{"prompt"'
        await asyncio.sleep(1)

    [slow] = ask(running, ("POST", "/v1/predict", {"content": slowly()}))
    assert error_of(slow) == (408, "slow_request")
