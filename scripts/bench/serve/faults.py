"""What a server does when things go wrong, one fault after another; prints each outcome as JSON.

python scripts/bench/serve/faults.py --artefact runs/quickstart/prompt --out runs/faults [FAULT ...]
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from load import summary
from prompts import name_of, variant
from safetensors.numpy import load_file, save_file
from servers import Cores, Server
from stages import Figures, Setup, capacity

import jaxprompt as jp


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


def killed_upload(setup: Setup) -> Figures:
    """kill -9 while a prompt is being replaced: the library has a whole version afterwards."""
    library, outcomes = fresh_library(setup, "killed"), []
    other = variant(setup.artefact, setup.out / "variant")
    name = name_of(0)
    for delay in (0.0, 0.01, 0.03):
        with setup.served("--library", str(library)) as server:
            stop = threading.Event()
            thread = threading.Thread(target=replace_until, args=(server, name, other, setup, stop))
            thread.start()
            time.sleep(0.2 + delay)
            server.process.kill()
            stop.set()
            thread.join()
        outcomes.append(len(jp.load_prompt(str(library / name)).vectors))
    with setup.served("--library", str(library)) as server:
        answered = status_of(lambda: server.client.predict(name, setup.inputs(1)))
    left = sorted(path.name for path in library.iterdir())
    return {"vectors_after_each_kill": outcomes, "answer_after_restart": answered, "left": left}


def replace_until(
    server: Server, name: str, other: Path, setup: Setup, stop: threading.Event
) -> None:
    client = jp.Client(server.client.url, retries=0)
    while not stop.is_set():
        with contextlib.suppress(jp.ServerError):
            client.put(name, other, replace=True)
            client.put(name, setup.artefact, replace=True)


def bad_artefacts(setup: Setup) -> Figures:
    """Damaged prompts over an existing name: each is refused, and the old one still answers."""
    library, name = fresh_library(setup, "bad"), name_of(0)
    found = {}
    with setup.served("--library", str(library)) as server:
        before = server.client.predict(name, setup.inputs(1))[0]
        for kind, folder in damaged(setup).items():
            refused = status_of(lambda f=folder: server.client.put(name, f, replace=True))
            after = server.client.predict(name, setup.inputs(1))[0]
            found[kind] = {"put": refused, "old_answers": after["digest"] == before["digest"]}
        (library / "linked").symlink_to(setup.artefact.resolve())
        shutil.copytree(setup.out / "damaged" / "nan", library / "dropped-in")
        time.sleep(5)
        for dropped in ("linked", "dropped-in"):
            found[dropped] = status_of(lambda n=dropped: server.client.predict(n, setup.inputs(1)))
    return found


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


def request_bytes(name: str, row: dict) -> bytes:
    from load import request_of

    return request_of("127.0.0.1", "/v1/predict", {"prompt": name, "inputs": [row]})


def disconnects(setup: Setup) -> Figures:
    """Clients that go away before their answer, and clients that never finish their request."""
    row, name = setup.inputs(1)[0], name_of(0)
    with setup.served("--library", str(fresh_library(setup, "disconnects"))) as server:
        address = ("127.0.0.1", server.port)
        for number in range(300):
            with socket.create_connection(address) as away:
                away.sendall(request_bytes(name, row))
                time.sleep(0.02 * (number % 3 == 0))
        slow = [socket.create_connection(address) for _ in range(100)]
        for each in slow:
            each.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        answers = server.load(names=[name], inputs=[row], phases=[(10, setup.seconds)])
        for each in slow:
            each.close()
        time.sleep(1)
        figures = server.metrics()
        return {
            "beside_them": summary(answers, setup.seconds),
            "cancelled": figures.get("jaxprompt_cancelled_rows_total"),
            "queue_rows_after": figures.get("jaxprompt_queue_rows"),
        }


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
        return {"statuses": Counter(each.status for each in answers)}


def terminated(setup: Setup) -> Figures:
    """SIGTERM under load: what was accepted is answered, and the exit code is 0."""
    with setup.served("--library", str(fresh_library(setup, "terminated"))) as server:
        rate = 0.8 * capacity(server, setup, [name_of(0)])
        timer = threading.Timer(3.0, lambda: server.process.send_signal(signal.SIGTERM))
        timer.start()
        answers = server.load(
            names=[name_of(0)], inputs=setup.inputs(), phases=[(rate, 3 + setup.seconds)]
        )
        code = server.process.wait(90)
        last_good = max(each.due for each in answers if each.status == 200)
        lost = [each for each in answers if each.status == 0 and each.due < last_good]
        return {
            "statuses": Counter(each.status for each in answers),
            "lost_before_the_last_answer": len(lost),
            "exit_code": code,
        }


def two_servers(setup: Setup) -> Figures:
    """Two servers on one library: what one is given, the other has soon."""
    library = fresh_library(setup, "shared")
    with (
        setup.served("--library", str(library)) as one,
        setup.served("--library", str(library)) as two,
    ):
        one.client.put("common", setup.artefact)
        begin = time.perf_counter()
        there = waited(lambda: two.client.predict("common", setup.inputs(1)))
        seen = time.perf_counter() - begin
        one.client.delete("common")
        begin = time.perf_counter()
        gone = waited(lambda: expect_404(two.client, setup))
        return {"put": there, "seconds": seen, "gone": gone, "gone_s": time.perf_counter() - begin}


def expect_404(client: jp.Client, setup: Setup) -> None:
    """Raises ServerError as long as the prompt is there."""
    try:
        client.predict("common", setup.inputs(1))
    except jp.ServerError as error:
        if error.status == 404:
            return
        raise
    raise jp.ServerError(200, "It is still there.")


def waited(act: Callable[[], object], seconds: float = 15.0) -> int | str:
    end = time.monotonic() + seconds
    while (found := status_of(act)) != 200 and time.monotonic() < end:
        time.sleep(0.1)
    return found


def flood(setup: Setup) -> Figures:
    """10,000 mixed requests of 64 clients that never wait: each is answered or refused."""
    count, rows = 10_000, setup.inputs()
    known = [name_of(number) for number in range(8)]
    with setup.served("--library", str(fresh_library(setup, "flood", 8))) as server:
        client = jp.Client(server.client.url, retries=0)
        texts = [next(iter(row.values())) for row in rows]

        def one(number: int) -> int | str:
            rng = random.Random(number)
            name, text = rng.choice(known), rng.choice(texts)
            pair = {"input": text, "target": "animal"}
            kind = number % 10
            if kind < 6:
                act = lambda: client.predict(name, rng.sample(rows, rng.choice((1, 1, 4))))
            elif kind < 8:
                act = lambda: client.score(name, [pair])
            elif kind < 9:
                act = lambda: client.complete(name, text, max_tokens=4, temperature=0.0)
            else:
                act = client.prompts
            found = status_of(act)
            return found if found == 200 else str(found)[:60]

        begin = time.perf_counter()
        with ThreadPoolExecutor(64) as threads:
            outcomes = Counter(threads.map(one, range(count)))
        seconds = time.perf_counter() - begin
        compiled = {k: v for k, v in server.metrics().items() if "compil" in k}
        return {"outcomes": outcomes, "seconds": seconds, "memory": server.memory(), **compiled}


def disk_full(setup: Setup) -> Figures:
    """The server may write no file above 64 KB: a put is refused, and the old version answers."""
    library, name = fresh_library(setup, "full"), name_of(0)
    with setup.served("--library", str(library)) as server:
        before = server.client.predict(name, setup.inputs(1))[0]["digest"]
        os.system(f"prlimit --pid {server.process.pid} --fsize=65536")
        other = variant(setup.artefact, setup.out / "variant")
        put = status_of(lambda: server.client.put(name, other, replace=True))
        after = server.client.predict(name, setup.inputs(1))[0]["digest"]
        left = sorted(path.name for path in library.iterdir())
        return {"put": put, "old_answers": before == after, "left": left}


FAULTS = {fault.__name__: fault for fault in (
    killed_upload, bad_artefacts, disconnects, delete_in_flight, terminated, two_servers, flood,
    disk_full,
)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help="all of them if none")
    parser.add_argument("--artefact", type=Path, default=Path("runs/quickstart/prompt"))
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--server", default="", help="further options of `jaxprompt serve`")
    given = parser.parse_args()
    setup = Setup(
        given.artefact, given.out, given.backbone, given.seconds, 1, given.server.split(),
        Cores("", ""),
    )  # fmt: skip
    for name in given.faults or FAULTS:
        print(json.dumps({name: FAULTS[name](setup)}, default=str), flush=True)


if __name__ == "__main__":
    main()
