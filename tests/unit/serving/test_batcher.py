"""The batcher with an engine that computes nothing: what becomes of rows, whatever happens."""

import queue
import random
import threading
import time

import numpy as np
import pytest

from jaxprompt.data.batches import Example
from jaxprompt.serving.batcher import Batcher, Broken, Late, Ticket
from jaxprompt.serving.fair_queue import Limits, Refused
from jaxprompt.serving.work import Chunk, Failed, Sampling, Scored, Tokens, Work

NOTHING = np.zeros(0, np.int32)


def tokens(*ids):
    ids = np.array(ids, np.int32)
    return Tokens(ids, np.zeros(len(ids)), np.zeros((len(ids), 0), int), np.zeros((len(ids), 0)))


def work(text=0, kind="score", **more):
    sampling = Sampling(max_tokens=3) if kind == "generate" else None
    example = Example(np.array([text], np.int32), NOTHING)
    return Work(kind, None, example, sampling, **more)


class FakeEngine:
    """Answers a row with its number; holds while ``gate`` is closed; breaks where told."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches, self.broken = [], set()

    def check(self, work):
        pass

    def lane(self, work):
        return (work.kind,)

    def cost(self, work):
        return 32

    def run(self, batch):
        self._enter(batch)
        numbers = [int(w.example.inputs[0]) for w in batch]
        if self.broken & set(numbers):
            raise RuntimeError("the device is on fire")
        return [Scored(float(number), 1) for number in numbers]

    def generate(self, batch):
        for step in range(3):
            self._enter(batch)
            yield [
                Chunk(tokens(step), "cancelled" if w.cancelled else "length" if step == 2 else None)
                for w in batch
            ]

    def _enter(self, batch):
        self.batches.append([int(w.example.inputs[0]) for w in batch])
        self.entered.set()
        assert self.gate.wait(20)


class Running:
    """A batcher whose deliveries happen in the thread of the test."""

    def __init__(self, limits=Limits(batch_rows=4, row_sizes=(1, 4)), **more):
        self.engine, self.inbox, self.answers = FakeEngine(), queue.SimpleQueue(), {}
        self.batcher = Batcher(self.engine, self.inbox.put, limits, **more)
        self.batcher.start()
        while self.batcher.state == "warming":
            time.sleep(0.001)

    def submit(self, *works, name="r", **more):
        answers = self.answers.setdefault(name, [])
        ticket = Ticket(works, answers.append, **more)
        self.batcher.submit(ticket)
        return ticket

    def hold(self):
        """Block the device with a row of its own."""
        self.engine.gate.clear()
        self.engine.entered.clear()
        self.submit(work(-1), name="held")
        assert self.engine.entered.wait(20)

    def release(self):
        self.engine.gate.set()

    def until(self, done):
        while not done():
            self.inbox.get(timeout=20)()

    def outcomes(self, name="r"):
        return [a.outcome for a in sorted(self.answers[name], key=lambda a: a.number)]

    def end(self):
        self.release()
        self.batcher.drain()
        assert self.batcher.join(20)
        while not self.inbox.empty():
            self.inbox.get()()


@pytest.fixture
def running():
    one = Running()
    yield one
    one.end()


def test_rows_of_several_requests_share_a_batch(running):
    running.hold()
    running.submit(work(1), work(2), name="a")
    running.submit(work(3), name="b")
    running.release()
    running.until(lambda: len(running.answers["a"]) == 2 and running.answers["b"])
    assert running.engine.batches == [[-1], [1, 2, 3]]
    assert [o.log_likelihood for o in running.outcomes("a")] == [1.0, 2.0]


def test_a_cancelled_request_is_not_computed(running):
    running.hold()
    gone = running.submit(work(1), work(2), name="gone")
    running.submit(work(3), name="stays")
    assert running.batcher.cancel(gone) == 2 and running.batcher.waiting == 1
    running.release()
    running.until(lambda: running.answers["stays"])
    assert running.engine.batches == [[-1], [3]] and not running.answers["gone"]


def test_a_row_past_its_deadline_is_told_so(running):
    running.hold()
    running.submit(work(1, deadline=time.monotonic() - 1), name="late")
    running.release()
    running.until(lambda: running.answers["late"])
    assert isinstance(running.outcomes("late")[0], Late)
    assert running.engine.batches == [[-1]]


def test_other_batches_run_between_the_chunks_of_a_generation(running):
    running.hold()
    running.submit(work(7, "generate"), name="long")
    running.submit(work(1), name="short")
    running.release()
    running.until(lambda: len(running.answers["long"]) == 3)
    assert running.engine.batches == [[-1], [7], [1], [7], [7]]
    assert [o.finish for o in running.outcomes("long")] == [None, None, "length"]


def test_a_generation_ends_with_its_next_chunk_where_it_is_cancelled(running):
    running.engine.gate.clear()
    ticket = running.submit(work(7, "generate"), name="long")
    assert running.engine.entered.wait(20)
    running.batcher.cancel(ticket)
    running.release()
    running.until(lambda: running.answers["long"])
    assert running.outcomes("long")[0].finish == "cancelled"


def test_one_row_that_breaks_the_device_takes_no_other_with_it(running):
    running.engine.broken = {2}
    running.hold()
    running.submit(work(1), work(2), work(3))
    running.release()
    running.until(lambda: len(running.answers["r"]) == 3)
    one, two, three = running.outcomes()
    assert one.log_likelihood == 1.0 and three.log_likelihood == 3.0
    assert isinstance(two, Broken) and running.batcher.state == "ready"


def test_a_device_that_always_fails_ends_the_batcher_and_every_row_hears_of_it():
    ended = []
    running = Running(ended=lambda: ended.append(True))
    running.engine.broken = set(range(100))
    running.hold()
    for name in "abcd":
        running.submit(*(work(n) for n in range(4)), name=name)
    running.release()
    running.until(lambda: ended)
    assert running.batcher.state == "failed"
    for name in "abcd":
        assert [type(o) for o in running.outcomes(name)] == [Broken] * 4
    # three batches, and each row once alone
    assert len(running.engine.batches) == 1 + 3 * (1 + 4)
    with pytest.raises(Refused):
        running.submit(work(1))


def test_draining_answers_what_was_admitted_and_admits_nothing_more():
    running = Running()
    running.hold()
    running.submit(*(work(n) for n in range(10)), work(5, "generate"))
    running.batcher.drain()
    with pytest.raises(Refused) as refused:
        running.submit(work(1), name="more")
    assert refused.value.reason == "draining"
    running.release()
    assert running.batcher.join(20)
    running.end()
    assert sum(a.last for a in running.answers["r"]) == 11
    assert not any(isinstance(o, Failed) for o in running.outcomes())


def test_nothing_is_admitted_before_all_is_compiled():
    gate = threading.Event()
    batcher = Batcher(FakeEngine(), lambda deliver: None, warm=lambda: gate.wait(20))
    batcher.start()
    with pytest.raises(Refused) as refused:
        batcher.submit(Ticket([work()], print))
    assert refused.value.reason == "not_ready"
    gate.set()
    batcher.drain()
    assert batcher.join(20)


@pytest.mark.parametrize("seed", range(3))
def test_every_accepted_row_is_answered_once(seed):
    """Four clients at once, with cancellations, deadlines, poison, and a drain at the end."""
    running, lock, accepted = Running(Limits(queued_rows=50, batch_rows=4)), threading.Lock(), {}
    running.engine.broken = {13}

    def client(number):
        rng = random.Random(seed * 10 + number)
        for turn in range(60):
            kind = rng.choice(["score", "score", "generate"])
            works = [work(rng.randrange(20), kind) for _ in range(rng.randrange(1, 6))]
            name = (number, turn)
            try:
                ticket = running.submit(*works, name=name, key=str(number))
            except Refused:
                time.sleep(0.0005)
                continue
            cancelled = rng.random() < 0.1
            if cancelled:
                running.batcher.cancel(ticket)
            with lock:
                accepted[name] = (works, cancelled)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    running.end()
    assert accepted
    for name, (works, cancelled) in accepted.items():
        last = [a for a in running.answers[name] if a.last]
        assert len({a.number for a in last}) == len(last)
        if not cancelled:
            assert len(last) == len(works)
        for answer in last:
            if isinstance(answer.outcome, Scored):
                asked = works[answer.number].example.inputs[0]
                assert answer.outcome.log_likelihood == asked
