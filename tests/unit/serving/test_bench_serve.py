"""The load generator and what the stages conclude; nothing here starts a server of prompts."""

import importlib
import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from helpers import SCRIPTS
from safetensors.numpy import load_file, save_file


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench" / "serve"))
    return importlib.import_module


def test_arrivals_have_the_rate_of_their_phase(script):
    times = script("load").arrivals([(50, 20), (0, 5), (500, 2)], random.Random(0))
    assert times == sorted(times)
    first, last = sum(t < 20 for t in times), sum(t >= 25 for t in times)
    assert first + last == len(times) and abs(first - 1000) < 130 and abs(last - 1000) < 130


def test_popularity_is_zipfs_law(script):
    assert script("load").popularity(4, 1.0) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert script("load").popularity(3, 0.0) == [1, 1, 1]


def test_a_summary_counts_what_was_refused_and_what_was_lost_apart(script):
    load = script("load")
    statuses = [200, 200, 503, 429, 0, 500]
    answers = [load.Answer(n / 10, 0.1 + n, s, "p", 1, None) for n, s in enumerate(statuses)]
    found = load.summary(answers, 2.0)
    assert (found["answered"], found["rejected"], found["lost"]) == (2, 1 / 3, 2)
    assert found["p99"] == 1.1 and found["throughput"] == 1.0 and found["offered"] == 3.0


def test_latency_counts_from_the_time_at_which_a_request_was_due(script):
    """A server that holds each answer back makes later requests no later."""
    load = script("load")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            threading.Event().wait(0.1)
            scores = [{"log_likelihood": -1.0}]
            found = {"predictions": [{"version": 3, "scores": scores, "echo": body}]}
            content = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        answers = load.run(
            load.Plan(
                host="127.0.0.1", port=server.server_port, phases=[(100, 0.2)], names=["a", "b"],
                zipf=1.0, inputs=[{"text": "x"}], seed=0, closed=0,
            )
        )  # fmt: skip
        server.shutdown()
    assert 5 < len(answers) and {each.name for each in answers} == {"a", "b"}
    assert all(each.status == 200 and each.scores == [-1.0] for each in answers)
    assert all(0.1 <= each.latency < 1 for each in answers)


def test_a_server_has_recovered_when_nothing_is_refused_and_answers_are_as_fast_as_before(script):
    load, stages = script("load"), script("stages")

    def answers(times, latency, status=200):
        return [load.Answer(t, latency, status, "p", 1, None) for t in times]

    before = answers(np.arange(0, 5, 0.1).tolist(), 0.01)
    slow = answers([10.1, 10.3, 10.6, 10.9], 0.5)
    fast = answers([11.1, 11.6, 12.2], 0.01)
    assert stages.recovery(before, [*slow, *fast], 10.0) == 1.0
    assert stages.recovery(before, fast, 10.0) == 0.0
    assert stages.recovery(before, slow, 10.0) is None


def test_an_answer_is_wrong_if_it_is_not_that_of_the_version_that_it_names(script):
    load, stages = script("load"), script("stages")
    rows = [(1, [-1.0, -2.0]), (2, [-3.0, -4.0]), (2, [-1.0, -2.0]), (9, [-1.0, -2.0])]
    answers = [load.Answer(0.0, 0.1, 200, "p", version, scores) for version, scores in rows]
    found = stages.judged(answers, {1: 0, 2: 1}, [[-1.0, -2.0], [-3.0, -4.0]])
    assert found["wrong_version"] == 2 and found["versions_seen"] == 3


def test_synthetic_prompts_differ_a_little_and_the_first_is_the_real_one(script, tmp_path):
    prompts = script("prompts")
    real = tmp_path / "real"
    real.mkdir()
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    save_file({"prompt": vectors}, real / "prompt.safetensors")
    (real / "prompt.json").write_text("{}")
    prompts.make_prompts(real, tmp_path / "many", 3)
    made = [load_file(tmp_path / "many" / prompts.name_of(n) / "prompt.safetensors")["prompt"]
            for n in range(3)]  # fmt: skip
    np.testing.assert_array_equal(made[0], vectors)
    assert 0 < np.abs(made[1] - vectors).max() < 0.5 and not np.array_equal(made[1], made[2])
    assert math.isclose(
        np.abs(load_file(prompts.variant(real, tmp_path / "v") / "prompt.safetensors")["prompt"][0]
               - vectors[-1] / 2).max(), 0.0)  # fmt: skip


def test_scripts_share_their_options(script, tmp_path):
    options = script("options")
    parser = options.common_options("What it does.", str(tmp_path / "out"), "--slots 9")
    setup = options.setup_of(parser.parse_args(["--backbone", "tiny"]), seconds=3.0)
    assert setup.out.is_dir() and setup.server_options == ("--slots", "9")
    assert (setup.backbone, setup.seconds, setup.cores.server) == ("tiny", 3.0, "")


def test_the_report_has_a_table_for_each_stage(script, tmp_path):
    level = {"share": 0.5, "offered": 10.0, "throughput": 9.9, "p50": 0.01, "p99": 0.05,
             "rejected": 0.0, "lost": 0}  # fmt: skip
    results = {
        "throughput": {"100": {"levels": [level]}},
        "distinct": {"32": {"ratio": 0.98, "rounds": [{"ratio": 0.98}]}},
        "mixed": {"32": {"cells": [{"distinct": 4, "mixed_seconds": 0.1, "apart_seconds": 0.3,
                                    "ratio": 3.0, "ratio_low": 2.0, "ratio_high": 4.0}]}},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    script("report").write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 100 | 0.5 | 10.0 | 9.9 | 10.0 | 50.0 | 0.0% | 0 |" in text
    assert "0.980 (0.980 to 0.980)" in text and "3.00 (2.00 to 4.00)" in text
    assert (tmp_path / "report.png").stat().st_size > 1000
