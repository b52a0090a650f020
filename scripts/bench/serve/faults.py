"""What a server does when things go wrong, one fault after another.

    python scripts/bench/serve/faults.py [FAULT ...] --artefact runs/quickstart/prompt

Puts each outcome into OUT/faults.json, with what is as it should be, and all of them into
OUT/faults.md. What is there already is not tried again without --again.
"""

import contextlib
import json
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from load import request_of, summary
from options import common_options, setup_of
from prompts import name_of
from safetensors.numpy import load_file, save_file
from servers import Server
from stages import Figures, Setup, capacity, names

import jaxprompt as jp

FAULTY = Path(__file__).with_name("faulty_server.py")
NAME = name_of(0)


def fresh_library(setup: Setup, name: str, count: int = 2) -> Path:
    """A library of its own for a fault."""
    folder = setup.out / "faults" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(setup.library(count), folder)
    return folder


def status_of(act: Callable[[], object]) -> int | str:
    """200, or the status and sentence of a refusal."""
    try:
        act()
    except jp.ServerError as error:
        return f"{error.status} {error.message[:140]}"
    return 200


def asks(server: Server, setup: Setup, name: str = NAME) -> int | str:
    """What a request gets now, without a second attempt."""
    client = jp.Client(server.client.url, retries=0, timeout=30)
    return status_of(lambda: client.predict(name, setup.inputs(1)))


def killed_upload(setup: Setup) -> Figures:
    """kill -9 while a prompt is being replaced: the library has a whole version afterwards."""
    library, outcomes = fresh_library(setup, "killed"), []
    other = setup.variant()
    for delay in (0.0, 0.01, 0.03):
        with setup.served("--library", str(library)) as server:
            stop = threading.Event()
            thread = threading.Thread(target=replace_until, args=(server, other, setup, stop))
            thread.start()
            time.sleep(0.2 + delay)
            server.process.kill()
            stop.set()
            thread.join()
        outcomes.append(len(jp.load_prompt(str(library / NAME)).vectors))
    with setup.served("--library", str(library)) as server:
        answered = asks(server, setup)
    left = sorted(path.name for path in library.iterdir())
    return {
        "vectors_after_each_kill": outcomes, "answer_after_restart": answered, "left": left,
        "ok": len(set(outcomes)) == 1 and answered == 200,
    }  # fmt: skip


def replace_until(server: Server, other: Path, setup: Setup, stop: threading.Event) -> None:
    client = jp.Client(server.client.url, retries=0)
    while not stop.is_set():
        with contextlib.suppress(jp.ServerError):
            client.put(NAME, other, replace=True)
            client.put(NAME, setup.artefact, replace=True)


def bad_artefacts(setup: Setup) -> Figures:
    """Damaged prompts over an existing name: each is refused, and the old one still answers."""
    library = fresh_library(setup, "bad")
    found = {}
    with setup.served("--library", str(library)) as server:
        before = server.client.predict(NAME, setup.inputs(1))[0]
        for kind, folder in damaged(setup).items():
            refused = status_of(lambda f=folder: server.client.put(NAME, f, replace=True))
            after = server.client.predict(NAME, setup.inputs(1))[0]
            found[kind] = {"put": refused, "old_answers": after["digest"] == before["digest"]}
        (library / "linked").symlink_to(setup.artefact.resolve())
        shutil.copytree(setup.out / "damaged" / "nan", library / "dropped-in")
        time.sleep(5)
        for dropped in ("linked", "dropped-in"):
            found[dropped] = {"predict": asks(server, setup, dropped), "old_answers": True}
    statuses = [each.get("put", each.get("predict")) for each in found.values()]
    refused = all(str(status).startswith(("400", "404", "413", "422")) for status in statuses)
    return found | {"ok": refused and all(each["old_answers"] for each in found.values())}


def damaged(setup: Setup) -> dict[str, Path]:
    """Folders that are no sound prompt."""
    root = setup.out / "damaged"
    shutil.rmtree(root, ignore_errors=True)
    tensors = load_file(setup.artefact / "prompt.safetensors")
    [(key, vectors)] = [(k, v) for k, v in tensors.items() if v.ndim == 2][:1]
    whole = (setup.artefact / "prompt.safetensors").read_bytes()
    contents: dict[str, bytes | dict[str, np.ndarray]] = {
        "truncated": whole[: len(whole) // 2],
        "huge-header": struct.pack("<Q", 2 << 30) + whole[8:],
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "empty": b"",
        "nan": {key: np.full_like(vectors, np.nan)},
        "wrong-width": {key: vectors[:, :-1].copy()},
        "too-long": {key: np.tile(vectors, (60, 1))},
    }
    folders = {}
    for kind, content in contents.items():
        folder = folders[kind] = root / kind
        folder.mkdir(parents=True)
        shutil.copy(setup.artefact / "prompt.json", folder)
        if isinstance(content, bytes):
            (folder / "prompt.safetensors").write_bytes(content)
        else:
            save_file(content, folder / "prompt.safetensors")
    return folders


def disconnects(setup: Setup) -> Figures:
    """Clients that go away in the queue or amid a stream, and ones that never finish a request."""
    rows = setup.inputs(4)
    request = request_of("127.0.0.1", "/v1/predict", {"prompt": NAME, "inputs": rows})
    text = next(iter(rows[0].values()))
    stream = request_of(
        "127.0.0.1", "/v1/completions",
        {"model": NAME, "prompt": text, "stream": True, "max_tokens": 32, "temperature": 1},
    )  # fmt: skip
    with (
        setup.served("--library", str(fresh_library(setup, "disconnects"))) as server,
        ThreadPoolExecutor(1) as beside,
    ):
        address = ("127.0.0.1", server.port)
        # while the device is busy with these rows, those of the clients wait
        busy = beside.submit(status_of, lambda: server.client.predict(NAME, setup.inputs(128)))
        waited(lambda: server.metrics()["jaxprompt_queue_rows"] > 0, 5)
        for number in range(300):
            with socket.create_connection(address) as away:
                away.sendall(request)
                time.sleep(0.02 * (number % 3 == 0))
        for _ in range(20):
            with socket.create_connection(address) as away:
                away.sendall(stream)
                away.recv(64)
        slow = [socket.create_connection(address) for _ in range(100)]
        for each in slow:
            each.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        answers = server.load(names=[NAME], inputs=rows[:1], phases=[(10, setup.seconds)])
        for each in slow:
            each.close()
        time.sleep(1)
        figures, others = server.metrics(), summary(answers, setup.seconds)
        cancelled, left = figures["jaxprompt_cancelled_rows_total"], figures["jaxprompt_queue_rows"]
        all_answered = busy.result() == 200 and others["answered"] == others["asked"]
        return {
            "beside_them": others, "busy_rows": busy.result(), "cancelled_rows": cancelled,
            "queue_rows_after": left, "ok": all_answered and cancelled > 0 and left == 0,
        }  # fmt: skip


def delete_in_flight(setup: Setup) -> Figures:
    """A prompt is removed and put back under load: each answer is one, or a 404."""
    name = name_of(1)
    with setup.served("--library", str(fresh_library(setup, "deleted"))) as server:
        stop = threading.Event()

        def change() -> None:
            while not stop.wait(0.2):
                server.client.delete(name)
                server.client.put(name, setup.artefact)

        thread = threading.Thread(target=change)
        thread.start()
        answers = server.load(names=[name], inputs=setup.inputs(), phases=[(30, setup.seconds)])
        stop.set()
        thread.join()
        statuses = Counter(each.status for each in answers)
        return {"statuses": statuses, "ok": not set(statuses) - {200, 404} and statuses[200] > 0}


def terminated(setup: Setup) -> Figures:
    """SIGTERM under load: what was accepted is answered, and the exit code is 0."""
    with setup.served("--library", str(fresh_library(setup, "terminated"))) as server:
        rate = 0.8 * capacity(server, setup, [NAME])
        timer = threading.Timer(3.0, lambda: server.process.send_signal(signal.SIGTERM))
        timer.start()
        # the server admits requests for 5 s after the signal, and refuses or closes later ones
        answers = server.load(names=[NAME], inputs=setup.inputs(), phases=[(rate, 10.0)])
        code = server.process.wait(90)
        last_good = max(each.due for each in answers if each.status == 200)
        lost = [each for each in answers if each.status == 0 and each.due < last_good]
        return {
            "statuses": Counter(each.status for each in answers),
            "lost_before_the_last_answer": len(lost),
            "exit_code": code,
            "ok": code == 0 and not lost,
        }


def two_servers(setup: Setup) -> Figures:
    """Two servers on one library: what one is given, the other has soon."""
    library, row = fresh_library(setup, "shared"), setup.inputs(1)
    with (
        setup.served("--library", str(library)) as one,
        setup.served("--library", str(library)) as two,
    ):
        one.client.put("common", setup.artefact)
        begin = time.perf_counter()
        there = waited(lambda: asks(two, setup, "common") == 200)
        seen = time.perf_counter() - begin
        one.client.delete("common")
        begin = time.perf_counter()
        gone = waited(lambda: str(asks(two, setup, "common")).startswith("404"))
        gone_seconds = time.perf_counter() - begin
        both = [each.client.predict(NAME, row)[0]["digest"] for each in (one, two)]
        return {
            "seconds_until_there": seen, "seconds_until_gone": gone_seconds,
            "ok": there and gone and both[0] == both[1],
        }  # fmt: skip


def waited(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def flood(setup: Setup) -> Figures:
    """10,000 mixed requests of 64 clients that never wait: each is answered or refused."""
    count, rows, known = 10_000, setup.inputs(), names(8)
    with setup.served("--library", str(fresh_library(setup, "flood", 8))) as server:
        client = jp.Client(server.client.url, retries=0)
        texts = [next(iter(row.values())) for row in rows]

        def one(number: int) -> int | str:
            rng = random.Random(number)
            name, text = rng.choice(known), rng.choice(texts)
            kind = number % 10
            if kind < 6:
                act = lambda: client.predict(name, rng.sample(rows, rng.choice((1, 1, 4))))
            elif kind < 8:
                act = lambda: client.score(name, [{"input": text, "target": "animal"}])
            elif kind < 9:
                act = lambda: client.complete(name, text, max_tokens=4, temperature=0.0)
            else:
                act = client.prompts
            found = status_of(act)
            return found if found == 200 else str(found)[:60]

        begin = time.perf_counter()
        with ThreadPoolExecutor(64) as threads:
            outcomes = Counter(threads.map(one, range(count)))
        compilations = server.metrics()["jaxprompt_compilations"]
        refused = sum(n for what, n in outcomes.items() if str(what).startswith(("429", "503")))
        return {
            "outcomes": outcomes,
            "seconds": time.perf_counter() - begin,
            "memory_mib": server.memory(),
            "compilations": compilations,
            "ok": outcomes[200] + refused == count and compilations == 0,
        }


def disk_full(setup: Setup) -> Figures:
    """The server may write no file above 4 KB: a put is refused, and the old version answers."""
    library = fresh_library(setup, "full")
    with setup.served("--library", str(library)) as server:
        before = server.client.predict(NAME, setup.inputs(1))[0]["digest"]
        pid = str(server.process.pid)
        subprocess.run(["prlimit", "--pid", pid, "--fsize=4096"], check=True)
        put = status_of(lambda: server.client.put(NAME, setup.variant(), replace=True))
        after = server.client.predict(NAME, setup.inputs(1))[0]["digest"]
        left = sorted(path.name for path in library.iterdir())
        ok = before == after and put != 200 and left == names(2)
        return {"put": put, "old_answers": before == after, "left": left, "ok": ok}


def all_pinned(setup: Setup) -> Figures:
    """Pins that would leave no slot are refused, and other prompts are still answered."""
    library = fresh_library(setup, "pinned", 8)
    with setup.served("--library", str(library), "--slots", "4") as server:
        pins = [status_of(lambda n=name: pin(server, n)) for name in names(4)]
        answers = [asks(server, setup, name) for name in names(8)]
        return {
            "pins": pins, "answers": Counter(map(str, answers)),
            "ok": pins[:2] == [200, 200] and pins[2] != 200 and set(answers) == {200},
        }  # fmt: skip


def pin(server: Server, name: str) -> None:
    server.client._post(f"/v1/prompts/{name}/pin", {"pinned": True}, name)


@contextlib.contextmanager
def faulty(setup: Setup, name: str) -> Iterator[tuple[Server, Callable]]:
    """A server that fails on demand, and what switches a failure of faulty_server.py on and off."""
    switches = setup.out / "switches"
    shutil.rmtree(switches, ignore_errors=True)
    switches.mkdir(parents=True)

    def switch(fault: str, on: bool = True) -> None:
        (switches / fault).touch() if on else (switches / fault).unlink()

    library = fresh_library(setup, name, 4)
    environment = {"FAULTS": str(switches.resolve())}
    with setup.served(
        "--library", str(library), "--timeout", "3", program=[str(FAULTY)], environment=environment
    ) as server:
        yield server, switch


def store_fails(setup: Setup) -> Figures:
    """A store that hangs or fails: warm prompts answer, cold ones are a 504 or 503 in time."""
    found: Figures = {}
    with faulty(setup, "store") as (server, switch):
        asks(server, setup)
        for number, fault in enumerate(("slow-store", "no-store"), 1):
            switch(fault)
            time.sleep(3)  # the scan meets it, too
            begin = time.perf_counter()
            warm = asks(server, setup)
            between = time.perf_counter()
            cold = asks(server, setup, name_of(number))
            found[fault] = {
                "warm": warm, "warm_seconds": between - begin,
                "cold": cold, "cold_seconds": time.perf_counter() - between,
            }  # fmt: skip
            switch(fault, on=False)
            found[fault]["afterwards"] = waited(
                lambda n=number: asks(server, setup, name_of(n)) == 200
            )
    ok = all(
        each["warm"] == 200 and each["warm_seconds"] < 1 and each["afterwards"]
        and str(each["cold"])[:3] in ("503", "504") and each["cold_seconds"] < 5
        for each in found.values()
    )  # fmt: skip
    return found | {"ok": ok}


def clock_jumps(setup: Setup) -> Figures:
    """The wall clock jumps by a day and back: nothing expires, and changes are still seen."""
    with faulty(setup, "clock") as (server, switch):
        before = asks(server, setup)
        switch("clock")
        within = [asks(server, setup, name) for name in names(4)]
        put = status_of(lambda: server.client.put("late", setup.artefact))
        switch("clock", on=False)
        after = [asks(server, setup), asks(server, setup, "late")]
        found = [before, *within, put, *after]
        return {"statuses": Counter(map(str, found)), "ok": set(found) == {200}}


def device_fails(setup: Setup) -> Figures:
    """A batch fails: its rows are tried again alone. All fail: the process ends with an error."""
    with faulty(setup, "device") as (server, switch):
        switch("device-once")
        rows = setup.inputs(4)
        again = status_of(lambda: server.client.predict(NAME, rows))
        switch("device")
        failed = [asks(server, setup) for _ in range(3)]
        code = server.process.wait(30)
        ok = again == 200 and all(str(each).startswith("500") for each in failed) and code != 0
        return {"one_failure": again, "always": failed, "exit_code": code, "ok": ok}


FAULTS = {fault.__name__: fault for fault in (
    killed_upload, bad_artefacts, disconnects, delete_in_flight, terminated, two_servers,
    disk_full, all_pinned, store_fails, clock_jumps, device_fails, flood,
)}  # fmt: skip


def main() -> None:
    parser = common_options(__doc__, "runs/faults")
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}; all of them if none")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--again", action="store_true", help="try also what is there already")
    given = parser.parse_args()
    if unknown := set(given.faults) - set(FAULTS):
        parser.error(f"{sorted(unknown)[0]!r} is no fault; there are {', '.join(FAULTS)}.")
    setup = setup_of(given, seconds=given.seconds)
    path = given.out / "faults.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in given.faults or FAULTS:
        if name in found and found[name]["ok"] and not given.again:
            continue
        try:
            outcome = FAULTS[name](setup)
        except Exception as error:
            traceback.print_exc()
            outcome = {"error": repr(error), "ok": False}
        found[name] = json.loads(json.dumps(outcome, default=str))
        path.write_text(json.dumps(found, indent=1))
        print(json.dumps({name: found[name]}), flush=True)
    (given.out / "faults.md").write_text(table(found))
    sys.exit(0 if all(each["ok"] for each in found.values()) else 1)


def table(found: Figures) -> str:
    """What happened, as Markdown."""
    lines = ["| fault | as it should be | outcome |", "|---|---|---|"]
    for name, outcome in found.items():
        told = ", ".join(
            f"{key} {json.dumps(value)}" for key, value in outcome.items() if key != "ok"
        )
        told = told.replace("|", "/")
        lines.append(f"| {FAULTS[name].__doc__} | {'yes' if outcome['ok'] else 'NO'} | {told} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
