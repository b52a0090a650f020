"""Which rows make the next batch, for random sequences of arrivals, cancellations and batches."""

import math

import numpy as np
import pytest

from jaxprompt.serving.fair_queue import FairQueue, Limits, Refused, Row

SMALL = Limits(
    queued_rows=64, batch_rows=8, batch_tokens=1024, batch_versions=3, row_sizes=(1, 4, 8)
)


def row(item=0, key="a", lane="rank", cost=32, version=None, deadline=math.inf):
    return Row(item, key, lane, cost, version, deadline)


def items(cut):
    return [row.item for row in cut.rows]


def test_a_batch_has_the_oldest_row_and_rows_of_its_lane_and_width():
    queue = FairQueue(SMALL)
    queue.admit([row(0, cost=64), row(1, lane="score"), row(2, cost=128), row(3, cost=64)])
    assert items(queue.cut(0)) == [0, 3, 2]  # the wide one is not worse than half of padding
    assert items(queue.cut(0)) == [1]
    assert items(queue.cut(0)) == [] and len(queue) == 0 and queue.tokens == 0


def test_a_row_that_would_be_mostly_padding_waits_for_its_own_batch():
    queue = FairQueue(SMALL)
    queue.admit([row(0, cost=512), *(row(n, cost=32) for n in range(1, 9))])
    assert items(queue.cut(0)) == [0, 1]
    assert items(queue.cut(0)) == [2, 3, 4, 5, 6, 7, 8]


def test_rows_beyond_a_compiled_size_wait_where_they_would_be_mostly_padding():
    queue = FairQueue(SMALL._replace(batch_rows=32, row_sizes=(1, 4, 32)))
    queue.admit([row(n) for n in range(6)])
    assert [len(queue.cut(0).rows) for _ in range(2)] == [4, 2]


def test_a_request_is_admitted_as_a_whole_or_not_at_all():
    queue = FairQueue(SMALL)
    queue.admit([row() for _ in range(60)])
    with pytest.raises(Refused, match="60 rows are waiting of at most 64") as full:
        queue.admit([row() for _ in range(5)])
    assert full.value.reason == "queue_full" and len(queue) == 60
    queue.admit([row(key="b") for _ in range(4)])
    with pytest.raises(Refused) as own:
        queue.admit([row(key="b")], key_rows=4)
    assert own.value.reason == "key_full"
    with pytest.raises(Refused, match="batch holds 1024") as large:
        FairQueue(SMALL).admit([row(), row(cost=2048)])
    assert large.value.reason == "too_large"


def test_late_rows_are_given_back_and_not_run():
    queue = FairQueue(SMALL)
    queue.admit([row(0, deadline=1.0), row(1, deadline=5.0)])
    cut = queue.cut(2.0)
    assert items(cut) == [1] and [late.item for late in cut.late] == [0]


def test_keys_get_equal_shares_of_tokens_whatever_they_send():
    queue = FairQueue(SMALL._replace(queued_rows=4096))
    queue.admit([row("many", "a") for _ in range(400)])
    queue.admit([row("wide", "b", cost=256) for _ in range(100)])
    served = {"a": 0, "b": 0}
    for _ in range(60):
        for each in queue.cut(0).rows:
            served[each.key] += each.cost
    assert abs(served["a"] - served["b"]) <= 1024


def test_a_key_that_comes_back_keeps_what_it_owes():
    queue = FairQueue(SMALL._replace(queued_rows=4096, batch_tokens=4096))
    queue.admit([row("b", "b") for _ in range(400)])
    wide = 0
    for _ in range(20):
        if not queue.waiting("a"):
            queue.admit([row("a", "a", lane="other", cost=4096)])
        wide += items(queue.cut(0)) == ["a"]
    assert wide == 2  # 4096 tokens are 16 batches of the other key


def test_what_may_not_run_now_does_not_hold_up_others():
    queue = FairQueue(SMALL)
    queue.admit([row(0, lane="generate"), row(1, lane="rank")])
    assert items(queue.cut(0, lambda lane: lane != "generate")) == [1]
    assert items(queue.cut(0, lambda lane: lane != "generate")) == []
    assert items(queue.cut(0)) == [0]


def check_batch(cut, waiting):
    rows = cut.rows
    assert len(rows) <= SMALL.batch_rows
    assert len({each.lane for each in rows}) <= 1
    assert len({each.version for each in rows}) <= SMALL.batch_versions
    if rows:
        assert len(rows) * max(each.cost for each in rows) <= SMALL.batch_tokens
    for each in rows:  # among the rows of a key, lane and width, the oldest goes first
        place = each.key, each.lane, each.cost, each.version
        older = [w for w in waiting if (w.key, w.lane, w.cost, w.version) == place]
        taken = [w for w in rows if (w.key, w.lane, w.cost, w.version) == place]
        assert sorted(w.sequence for w in older)[: len(taken)] == [w.sequence for w in taken]


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_loses_no_row_and_starves_none(seed):
    rng = np.random.default_rng(seed)
    queue, waiting, since, number = FairQueue(SMALL), [], {}, 0
    for _ in range(300):
        action = rng.choice(["admit", "cut", "discard"], p=[0.5, 0.4, 0.1])
        if action == "admit":
            key = str(rng.choice(["a", "b", "c"]))
            rows = [
                row(number + i, key, str(rng.choice(["rank", "score"])),
                    int(rng.choice([32, 64, 128, 512])), int(rng.integers(5)))
                for i in range(rng.integers(1, 12))
            ]  # fmt: skip
            number += len(rows)
            before = len(queue)
            try:
                queue.admit(rows)
                waiting += rows
                since |= {id(each): 0 for each in rows}
            except Refused:
                assert len(queue) == before and before + len(rows) > SMALL.queued_rows
        elif action == "discard" and waiting:
            gone = waiting.pop(int(rng.integers(len(waiting))))
            assert queue.discard(gone) and not queue.discard(gone)
        else:
            cut = queue.cut(0)
            assert bool(cut.rows) == bool(waiting) and not cut.late
            check_batch(cut, waiting)
            waiting = [each for each in waiting if each not in cut.rows]
            for each in waiting:
                since[id(each)] += 1
                assert since[id(each)] <= SMALL.queued_rows
        assert len(queue) == len(waiting)
        assert queue.tokens == sum(each.cost for each in waiting)
    while rows := queue.cut(0).rows:
        waiting = [each for each in waiting if each not in rows]
    assert not waiting and len(queue) == 0
